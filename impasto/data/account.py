"""What a run tells of its pictures and captions before it begins: every one accounted for, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from impasto.data.captions import Captions
from impasto.data.dataset import Listing
from impasto.data.many import Many, Tally
from impasto.data.options import DataOptions

if TYPE_CHECKING:
    from impasto.data.source import Item


def tally(items: Sequence[Item], buckets: Sequence[tuple[int, int]]) -> Tally:
    """Pictures counted."""
    if isinstance(items, Many):
        return items.tally(buckets)
    cropped = max(items, key=lambda item: item.placement.cropped)
    enlarged = [item for item in items if item.placement.scale > 1]
    most = max(enlarged, key=lambda item: item.placement.scale) if enlarged else items[0]
    return Tally(len(items), Counter(item.placement.bucket for item in items),
                 sum(item.placement.cropped for item in items) / len(items),
                 (cropped.placement.cropped, cropped.picture.name), len(enlarged),
                 (most.placement.scale, most.picture.name), sum(item.placement.bucket not in buckets for item in items),
                 len(items) - len({item.picture.digest for item in items}))


def account(title: str, items: Sequence[Item], buckets: Sequence[tuple[int, int]]) -> list[str]:
    """How many there are, in which buckets, and what was cut off or enlarged: lines for the user."""
    told = tally(items, buckets)
    shapes = ", ".join(f"{count} at {width}x{height}" for (height, width), count
                       in sorted(told.shapes.items(), key=lambda pair: (-pair[1], pair[0])))
    lines = [f"{told.count} {title}: {shapes}"]
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


def unused(listing: Listing, data: DataOptions, captions: Captions) -> list[str]:
    """What lies in the folder and is not used, in lines for the user."""
    notes = []
    if listing.unreadable:
        notes.append(f"not used, since nothing here reads such files: {', '.join(listing.unreadable)}")
    if data.caption is not None and listing.captions:
        kind = ".txt" if all(name.lower().endswith(".txt") for name in listing.captions) else "caption"
        notes.append(f"{len(listing.captions)} {kind} files are not read, as data.caption is set")
    if captions.overruled:
        name, told = next(iter(captions.overruled.items()))
        notes.append(f"pictures of which two files say different things: {len(captions.overruled)} ({name}: {told}; "
                     "data.caption_source chooses)")
    return notes + [f"{name} is not read: it {reason}" for name, reason in captions.unread.items()]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
