"""What a run tells of its pictures and captions before it begins: every one accounted for, in a few lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from impasto.data.augment import Augment
from impasto.data.buckets import all_buckets
from impasto.data.captions import Captions
from impasto.data.dataset import Listing
from impasto.data.many import Many, Tally
from impasto.data.options import DataOptions
from impasto.data.sets import DataSets, label

if TYPE_CHECKING:
    from impasto.data.items import Item


def accounts(data: DataOptions | DataSets, pictures: Sequence[Item], class_pictures: Sequence[Item],
             held_out: Sequence[Item]) -> list[str]:
    """`account` of each set, of class pictures and of held-out ones; and how often each set's pictures come."""
    buckets = [all_buckets(one) for one in data.sets]
    lines = []
    for number, one in enumerate(data.sets):
        own = of_set(pictures, number)
        lines += account("pictures" if len(data.sets) == 1 else f"pictures of {label(number, data)} "
                         f"({one.folder or 'the drawn world'})", own, buckets[number])
    if any(one.repeats > 1 for one in data.sets):
        lines.append("in an epoch a picture comes " + ", ".join(
            (f"of {label(number, data)} " if len(data.sets) > 1 else "") + (f"{one.repeats} times" if one.repeats > 1
                                                                           else "once")
            for number, one in enumerate(data.sets)))
    for number, one in enumerate(data.sets):
        if (augment := Augment.of(one)).facts:
            ways = ", ".join(name.replace("_", " ") for name, value in augment.facts if value and name != "variants")
            where = f" of {label(number, data)}" if len(data.sets) > 1 else ""
            lines.append(f"each picture{where} is shown in {augment.variants} versions, by {ways}; kept encoded")
    for number, one in enumerate(data.sets):
        if one.mask != "none":
            own, where = of_set(pictures, number), f" of {label(number, data)}" if len(data.sets) > 1 else ""
            names = {item.picture.name for item in own if item.mask is not None}
            count = f"{len(names)} of {len({item.picture.name for item in own})}"
            lines.append(f"pictures{where} of which a mask says what is drawn anew: {count}" if one.inpaint == "mask"
                         else f"pictures{where} of which parts count by a mask: {count}; the rest of each weighs "
                         f"{one.mask_floor:g}")
    for number, one in enumerate(data.sets):
        if one.pairs != "none":
            where = f" of {label(number, data)}" if len(data.sets) > 1 else ""
            shares = [f"{share:.0%} of the samples without {what}" for share, what in (
                (one.caption_dropout, "caption"), (one.source_dropout, "that one"), (one.both_dropout, "either"))
                if share]
            lines.append(", ".join([f"each picture{where} comes with the one that it is made of", *shares]))
    for number, one in enumerate(data.sets):
        lines += _weights(one, of_set(pictures, number), f" of {label(number, data)}" if len(data.sets) > 1 else "")
    shares = [one.share or 0.0 for one in data.sets]
    if any(shares):
        lines.append("of the samples " + ", ".join(f"{share / sum(shares):.1%} are of {label(number, data)}"
                                                   for number, share in enumerate(shares)))
    if class_pictures:
        lines += account("class pictures", class_pictures, buckets[0])
    if held_out:
        lines += account("held-out pictures", held_out, sorted({size for sizes in buckets for size in sizes}))
    return lines


def _weights(data: DataOptions, items: Sequence[Item], where: str) -> list[str]:
    """Which pictures' losses weigh more or less than the others', and patterns for that without effect."""
    if isinstance(items, Many):  # it would be to read all captions
        return []
    own = {item.picture.name: item.own_weight for item in items if item.own_weight != 1}
    lines = [f"pictures{where} with a loss weight of their own, or of their caption: {len(own)}, from "
             f"{min(own.values()):g} to {max(own.values()):g}"] if own else []
    idle = [pattern for pattern in data.caption_loss_weights
            if not any(re.search(pattern, item.caption, re.IGNORECASE) for item in items)]
    return lines + [f"caption_loss_weights that are in no caption{where}: {', '.join(map(repr, idle))}"] * bool(idle)


def of_set(items: Sequence[Item], number: int) -> Sequence[Item]:
    """Those of set `number`."""
    return items if isinstance(items, Many) else [item for item in items if item.handling.number == number]


def tally(items: Sequence[Item], buckets: Sequence[tuple[int, int]]) -> Tally:
    """Pictures counted."""
    if isinstance(items, Many):
        return items.tally(buckets)
    cropped = max(items, key=lambda item: item.placement.cropped)
    enlarged = [item for item in items if item.placement.scale > 1]
    most = max(enlarged, key=lambda item: item.placement.scale) if enlarged else items[0]
    uses = Counter((item.handling.number, item.picture.name) for item in items)
    return Tally(len(uses), Counter(item.placement.bucket for item in items),
                 sum(item.placement.cropped for item in items) / len(items),
                 (cropped.placement.cropped, cropped.picture.name), len(enlarged),
                 (most.placement.scale, most.picture.name), sum(item.placement.bucket not in buckets for item in items),
                 len(uses) - len({item.picture.digest for item in items}),
                 sum(count < max(uses.values()) for count in uses.values()))


def account(title: str, items: Sequence[Item], buckets: Sequence[tuple[int, int]]) -> list[str]:
    """How many there are, in which buckets, and what was cut off or enlarged: lines for the user."""
    told = tally(items, buckets)
    shapes = ", ".join(f"{count} at {width}x{height}" for (height, width), count
                       in sorted(told.shapes.items(), key=lambda pair: (-pair[1], pair[0])))
    counted = title if told.count != 1 else title.replace("pictures", "picture", 1)
    lines = [f"{told.count} {counted}: {shapes}"]
    if told.fewer:
        lines.append(f"{title} that come at fewer resolutions than others, since they are too small for them: "
                     f"{told.fewer}")
    if told.cropped_most[0] > 0:
        lines.append(f"{title} are cropped by {told.cropped_mean:.1%} of their area on average, at most by "
                     f"{told.cropped_most[0]:.1%} ({told.cropped_most[1]})")
    if told.enlarged:
        lines.append(f"{title} that are enlarged: {told.enlarged}, at most {told.enlarged_most[0]:.2f} times "
                     f"({told.enlarged_most[1]})")
    if told.own:
        lines.append(f"{title} too small for any bucket, in one of their own size: {told.own}")
    if told.copies:
        lines.append(f"{title} that are copies of others: {told.copies}")
    return lines


def wordings(items: Sequence[Item]) -> list[str]:
    """What becomes of captions, by an example, and which of them are cut: lines for the user."""
    if isinstance(items, Many) and not items[0].phrasing.facts:  # all of one recipe: spare the reading of all
        return []
    first: Item | None = None
    choices, cut, most, example = 0, 0, "", ""
    for item in items:
        if not item.caption or not item.phrasing.facts:
            continue
        first = first or item
        choices += item.phrasing.has_choice(item.caption)
        if lost := item.phrasing.lost(item.caption):
            cut += 1
            if len(lost) > len(most):
                most, example = lost, item.picture.name
    if first is None:
        return []
    how = first.phrasing
    ways = ["tags in another order"] * how.shuffle + [f"{how.dropout:.0%} of tags left out"] * (how.dropout > 0)
    lines = [f"captions are trained as in {first.picture.name}: {_short(how.plain(first.caption))}"
             + (f", in each use with {' and '.join(ways)}" if ways else "")]
    if choices:
        lines.append(f"captions with alternatives, of which one is chosen in each use: {choices}")
    if cut:
        lines.append(f"captions that are cut to {how.max_tokens} tokens (data.max_tokens): {cut}; most "
                     f"is lost of {example}: {_short(most)}")
    return lines


def unread(items: Sequence[Item], longest: int | None) -> list[str]:
    """Which captions are longer than what the base reads of them (`Base.longest`): a line for the user."""
    if longest is None or isinstance(items, Many):  # it would be to read all captions
        return []
    lost = {item.picture.name: words for item in items if (item.phrasing.max_tokens or longest + 1) > longest
            and (words := replace(item.phrasing, max_tokens=longest).lost(item.caption))}
    if not lost:
        return []
    most = max(lost, key=lambda name: len(lost[name]))
    return [f"captions of more than {longest} tokens, of which CLIP reads no more in this family: {len(lost)}; most is "
            f"lost of {most}: {_short(lost[most])}"]


def unused(listing: Listing, data: DataOptions, captions: Captions) -> list[str]:
    """What lies in the folder and is not used, in lines for the user."""
    notes = []
    if listing.unreadable:
        notes.append(f"not used, since nothing here reads such files: {', '.join(listing.unreadable)}")
    if data.caption is not None and listing.captions:
        kind = ".txt" if all(name.lower().endswith(".txt") for name in listing.captions) else "caption"
        notes.append(f"{len(listing.captions)} {kind} files are not read, as data.caption is set")
    if listing.masks and data.mask != "files":
        notes.append(f"masks that are not read, as data.mask is not files: {len(listing.masks)}")
    if captions.overruled:
        name, told = next(iter(captions.overruled.items()))
        notes.append(f"pictures of which two files say different things: {len(captions.overruled)} ({name}: {told}; "
                     "data.caption_source chooses)")
    return notes + [f"{name} is not read: it {reason}" for name, reason in captions.unread.items()]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
