"""What is found about a folder's pictures and captions, each with what to do about it. Facts in, findings out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from impasto.data.buckets import all_buckets, too_small
from impasto.data.dataset import Problem
from impasto.data.inventory import Inventory
from impasto.data.looks import Look
from impasto.data.options import DataOptions
from impasto.data.shapes import orientation
from impasto.data.wording import CHUNK, ODDITIES, Tags, oddities

#: more of a picture's area than this cut off, or more enlarged than this, is worth a warning
MUCH_CROPPED, MUCH_ENLARGED = 0.25, 1.5
#: share of a picture that may be of one colour, and of it that may be transparent, before it is noted
ONE_COLOUR, SEE_THROUGH = 0.9, 0.001
#: a picture is called blurred where its Laplacian has less than this part of its greys' variance. Photos have 0.03 and
#: more; blurred by a Gaussian of 3 pixels at 512 (`looks.SIDE`) nearly all of them have less than 0.005
BLURRED = 0.005
#: greys of a smaller variance are too plain to tell
PLAIN_GREYS = 25.0
#: what the caption for all pictures is called among names
ALL = "data.caption"
#: a caption that so many pictures share is noted
SHARED = 3


class Level(StrEnum):
    """How much a finding matters."""

    REFUSED = "refused"  # a run would refuse it
    WARNING = "warning"  # a run would take it, and learn something that is hardly meant
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is so of some pictures. `what` begins with its number of pictures or files."""

    level: Level
    kind: str  # a word for machines, always the same
    what: str
    fix: str  # what to do about it; may be empty
    names: dict[str, str]  # picture or file -> what is to be said of it, which may be nothing
    more: int = 0  # how many are not among the names, where they are too many


@dataclass(frozen=True)
class Alike:
    """Pictures that are copies of each other or look alike; the largest stands first."""

    names: list[str]
    distances: list[int]  # bits of 64 in which each differs from the first; 0 for exact copies
    exact: bool
    more: int = 0  # how many are not among the names, where they are too many


def all_findings(inventory: Inventory, groups: Sequence[Alike], tags: Tags | None) -> list[Finding]:
    """Everything that is to be said of a folder: what a run refuses first, then warnings, then notes."""
    found = [*refusals(inventory), *alike_findings(groups, inventory.captions.get), *_cuts(inventory),
             *_batches(inventory), *_captions(inventory), *_wording(inventory, tags), *_stored(inventory),
             *_shown(inventory)]
    order = list(Level)
    return sorted(found, key=lambda finding: order.index(finding.level))


# --- what a run refuses ------------------------------------------------------------------------------------


def refusals(inventory: Inventory) -> Iterator[Finding]:
    """What a run would not begin with, all of it at once."""
    mend = "mend them or take them out of the folder"
    if inventory.problems:
        yield Finding(Level.REFUSED, "unreadable", f"{number(len(inventory.problems), 'picture')} cannot be read",
                      mend, _named(inventory.problems))
    small = {name: too_small(inventory.looks[name].size, inventory.data)
             for name, placement in inventory.placements.items() if placement is None}
    if small:
        yield Finding(Level.REFUSED, "too small", f"{are(small, 'picture')} too small",
                      "replace them by larger ones, or lower data.resolution", small)
    pictures = set(inventory.listing.pictures)
    of_pictures = [problem for problem in inventory.caption_problems if problem.name in pictures]
    of_files = [problem for problem in inventory.caption_problems if problem.name not in pictures]
    if of_pictures:
        all_of_them = len(of_pictures) == len(pictures)
        fix = "give one caption for all with data.caption=…" if all_of_them else \
            "write a .txt file beside each, or a row in a table, or allow it with data.missing_captions=empty"
        yield Finding(Level.REFUSED, "no caption", f"{number(len(of_pictures), 'picture')} without a caption", fix,
                      _named(of_pictures))
    if inventory.mask_problems:
        yield Finding(Level.REFUSED, "mask", f"{number(len(inventory.mask_problems), 'picture')} without a mask that "
                      "fits", "draw those masks, or let pictures without one count in full with "
                      "data.missing_masks=whole", _named(inventory.mask_problems))
    if inventory.pair_problems:
        yield Finding(Level.REFUSED, "pair", f"{number(len(inventory.pair_problems), 'picture')} without a picture "
                      "to edit that fits", "put it beside each, or take the picture out of the folder",
                      _named(inventory.pair_problems))
    if of_files:
        yield Finding(Level.REFUSED, "caption file", f"{number(len(of_files), 'caption file')} that cannot be used",
                      mend, _named(of_files))


def _named(problems: Sequence[Problem]) -> dict[str, str]:
    return {problem.name: problem.reason for problem in problems}


# --- copies ------------------------------------------------------------------------------------------------


def alike_findings(groups: Sequence[Alike], caption: Callable[[str], str | None], most: int | None = None,
                   unlisted: Mapping[bool, int] | None = None) -> Iterator[Finding]:
    """Exact copies, then near ones; `most` of each are named.

    `caption` is of a picture by name; `unlisted` how many (exact: True) there are in groups beside these.
    """
    for exact, kind, what, fix in (
            (True, "copies", "exact cop{} of other pictures", "keep one of each: what is there twice is learned twice"),
            (False, "near-duplicates", "near-cop{} of other pictures",
             "keep the best of each, unless they are meant to count more than once")):
        own = [group for group in groups if group.exact is exact]
        count = sum(len(group.names) - 1 + group.more for group in own) + (unlisted or {}).get(exact, 0)
        pairs = ((group.names[0], name, bits) for group in own
                 for name, bits in zip(group.names[1:], group.distances[1:], strict=True))
        names = {}
        for first, name, bits in itertools.islice(pairs, most):
            told = f"of {first}" if exact else f"like {first} ({number(bits, 'bit')} of 64 differ)"
            names[name] = f"{told}, with another caption" if exact and caption(first) != caption(name) else told
        if count:
            what = what.format("y" if count == 1 else "ies")
            yield Finding(Level.WARNING, kind, f"{count:,} {what}", fix, names, count - len(names))


# --- cuts --------------------------------------------------------------------------------------------------


def _cuts(inventory: Inventory) -> Iterator[Finding]:
    data, placed = inventory.data, inventory.placed
    cropped = sorted((p.cropped, name) for name, p in placed.items() if p.cropped >= MUCH_CROPPED)[::-1]
    if cropped:
        fix = "crop them by hand to what matters" if data.buckets else \
            "let them keep their shape with data.buckets=true, or crop them by hand"
        yield Finding(Level.WARNING, "cropped", f"{number(len(cropped), 'picture')} cropped by a quarter or more",
                      fix, {name: f"loses {share:.0%} of its area" for share, name in cropped})
    enlarged = sorted((p.scale, name) for name, p in placed.items() if p.scale > 1)[::-1]
    if enlarged:
        much = sum(scale > MUCH_ENLARGED for scale, _ in enlarged)
        names = {name: f"{scale:.2f} times" for scale, name in enlarged}
        yield Finding(
            Level.WARNING if much else Level.NOTE, "enlarged",
            f"{are(names, 'picture')} enlarged" + (f", {much} more than {MUCH_ENLARGED:g} times" if much else ""),
            "take larger ones, lower data.resolution, or give them smaller buckets with data.upscale=never", names)
    buckets = set(all_buckets(data))
    own = {name: f"{p.bucket[1]}x{p.bucket[0]}" for name, p in placed.items() if p.bucket not in buckets}
    if own:
        yield Finding(Level.NOTE, "own bucket", f"{are(own, 'picture')} too small for any bucket, in one of their own",
                      "", own)
    if data.resolutions is not None:
        smaller = {name: f"not at {max(data.resolutions)}" for name, p in placed.items()
                   if len(inventory.more_cuts.get(name, ())) + 1 < len(data.resolutions)}
        if smaller:
            yield Finding(Level.NOTE, "fewer resolutions", f"{are(smaller, 'picture')} too small for each resolution, "
                          "and used at fewer", "", smaller)
    shapes = Counter(orientation(look.size) for look in inventory.looks.values())
    if len(shapes) > 1 and not data.buckets:
        told = ", ".join(f"{count} {shape}" for shape, count in shapes.most_common())
        yield Finding(Level.NOTE, "mixed shapes", f"{number(len(inventory.looks), 'picture')} of mixed shapes ({told}) "
                      "are all cut to squares", "data.buckets=true keeps their shapes", {})


def _batches(inventory: Inventory) -> Iterator[Finding]:
    """Buckets that cannot fill a batch."""
    if inventory.data.share is not None:
        return  # batches are filled from one round to the next
    counts = Counter(p.bucket for p in inventory.all_cuts)
    thin = {f"{width}x{height}": number(counts[height, width], "picture")
            for (height, width), uses in sorted(inventory.uses.items())
            if uses + inventory.company[height, width] < inventory.batch}
    if thin:
        yield Finding(Level.WARNING, "thin buckets",
                      f"{number(len(thin), 'bucket')} of fewer pictures than a batch of {inventory.batch}: in their "
                      "batches a picture is there twice", "lower train.batch_size, raise data.bucket_step, or crop "
                      "those pictures to a shape that others have", thin)


# --- captions ----------------------------------------------------------------------------------------------


def _captions(inventory: Inventory) -> Iterator[Finding]:
    """Captions that are not there or not read, and files of them."""
    if inventory.data.caption is not None and inventory.listing.captions:
        names = dict.fromkeys(inventory.listing.captions, "")
        yield Finding(Level.WARNING, "unread captions", f"{number(len(names), 'caption file')} not read, since one "
                      "caption is given for all", "leave data.caption out to use them", names)
    if inventory.overruled:
        yield Finding(Level.WARNING, "captions differ", f"{number(len(inventory.overruled), 'picture')} of which two "
                      "files say different things", "take one of them away, or choose with data.caption_source",
                      inventory.overruled)
    if inventory.unread:
        yield Finding(Level.NOTE, "unread files", f"{number(len(inventory.unread), 'file')} that might be captions and "
                      "cannot be used; none is missing", "", inventory.unread)
    known = {problem.name for problem in inventory.caption_problems}
    empty = {name: "" for name, text in inventory.captions.items() if not text and name not in known}
    if empty:
        yield Finding(Level.WARNING, "empty captions", f"{number(len(empty), 'picture')} without a caption, learned "
                      "with none", "write a .txt file beside each", empty)
    if inventory.caption_files:
        yield Finding(Level.NOTE, "caption files", f"{number(len(inventory.caption_files), 'caption file')} written "
                      "in an unusual way, and read all the same", "",
                      {name: ", ".join(odd) for name, odd in inventory.caption_files.items()})


def _wording(inventory: Inventory, tags: Tags | None) -> Iterator[Finding]:
    """What the captions say."""
    one = inventory.data.caption
    texts = {name: text for name, text in inventory.captions.items() if text} if one is None else {ALL: one}
    meant = meant_oddities(inventory.data)
    found: dict[str, dict[str, str]] = {}
    for name, text in texts.items():
        for kind in oddities(inventory.phrasing.body(text), tags is not None, inventory.phrasing.separator):
            if kind not in meant:
                found.setdefault(kind, {})[name] = text
    yield from odd_captions(found, {kind: len(names) for kind, names in found.items()})
    chunks = inventory.chunks if one is None else {ALL: max(inventory.chunks.values(), default=1)}
    long = {name: number(chunks[name], "chunk") for name in texts if chunks[name] > 1}
    cut = inventory.cut if one is None else dict.fromkeys([ALL] * bool(inventory.cut), next(iter(
        inventory.cut.values()), ""))
    if cut:
        yield Finding(Level.WARNING, "cut captions", f"{number(len(cut), 'caption')} cut to "
                      f"{inventory.data.max_tokens} tokens", "leave data.max_tokens out: they may have any length", cut)
    elif long and inventory.data.max_tokens is None:
        yield Finding(Level.NOTE, "long captions", f"{number(len(long), 'caption')} longer than one chunk of {CHUNK} "
                      "tokens: nothing is cut here, but other programs may cut them", "", long)
    counts = Counter(texts.values())
    shared = {name: text for name, text in texts.items() if counts[text] >= SHARED}
    if shared:
        yield shared_captions(shared, len(shared), len(set(shared.values())), "picture")
    if tags is not None and tags.spellings:
        yield tag_spellings(tags)


def meant_oddities(data: DataOptions) -> tuple[str, ...]:
    """Kinds of oddities that the recipe asks for."""
    return ("weight", "bracket") if data.caption_weights else ()


def odd_captions(names: Mapping[str, dict[str, str]], counts: Mapping[str, int]) -> Iterator[Finding]:
    """A finding for each kind of oddity: the captions that are named, and how many there are."""
    for kind, what in ODDITIES.items():
        if counts.get(kind):
            level = Level.WARNING if kind in ("mojibake", "control", "cut") else Level.NOTE
            fix = {"mojibake": "save those files as UTF-8", "cut": "write them to their end",
                   "wildcard": "data.wildcards=true chooses one of them in each use"}.get(kind, "")
            yield Finding(level, f"caption {kind}", f"{number(counts[kind], 'caption')} {what}", fix, names[kind],
                          counts[kind] - len(names[kind]))


def shared_captions(names: dict[str, str], count: int, different: int, noun: str) -> Finding:
    """`count` pictures, some of them named, that share `different` captions."""
    return Finding(Level.NOTE, "shared captions", f"{number(count, noun)} that share {number(different, 'caption')}",
                   "", names, count - len(names))


def tag_spellings(tags: Tags, most: int | None = None) -> Finding:
    """Tags written in several ways, `most` of them named."""
    return Finding(Level.NOTE, "tag spellings", f"{number(len(tags.spellings), 'tag')} written in several ways",
                   "write each in one way", {same[0]: ", ".join(same[1:]) for same in tags.spellings[:most]},
                   max(len(tags.spellings) - most, 0) if most is not None else 0)


# --- how pictures are stored, and what they show -----------------------------------------------------------


def _stored(inventory: Inventory) -> Iterator[Finding]:
    looks, data = inventory.looks, inventory.data
    if inventory.listing.unreadable:
        names = dict.fromkeys(inventory.listing.unreadable, "")
        yield Finding(Level.WARNING, "other kinds", f"{are(names, 'picture')} of a kind that is not read here, and "
                      "not used", "save them as .jpg or .png", names)
    clear = {name: f"{look.clear:.0%} of it" for name, look in looks.items() if look.clear > SEE_THROUGH}
    if clear:
        yield Finding(Level.NOTE, "transparent", f"{are(clear, 'picture')} transparent in parts, which are learned as "
                      f"{data.background}", "choose another colour with data.background", clear)
    unmasked = len(looks) - inventory.masked
    if data.mask != "none" and inventory.masked and unmasked and not inventory.mask_problems:
        yield Finding(Level.NOTE, "no mask", f"{number(unmasked, 'picture')} without a mask, and "
                      f"{'drawn anew as a whole' if data.inpaint == 'mask' else 'counted in full'}", "",
                      {})
    if data.mask != "files" and inventory.listing.masks:
        yield Finding(Level.NOTE, "unread masks", f"{number(len(inventory.listing.masks), 'mask')} not read",
                      "use them with data.mask=files", dict.fromkeys(inventory.listing.masks, ""))
    converted = {name: _MODES[look.mode] for name, look in looks.items() if look.mode in _MODES}
    if converted:
        yield Finding(Level.NOTE, "converted", f"{are(converted, 'picture')} not stored as RGB of 8 bits, and "
                      "converted", "", converted)
    turned = {name: "" for name, look in looks.items() if look.turned}
    if turned:
        yield Finding(Level.NOTE, "turned", f"{are(turned, 'picture')} set upright by EXIF", "", turned)
    animated = {name: look.format for name, look in looks.items() if look.animated}
    if animated:
        yield Finding(Level.NOTE, "animated", f"{number(len(animated), 'file')} with several frames or pages, of "
                      "which the first is used", "", animated)


#: ways of storing that are converted, for people
_MODES = {"CMYK": "CMYK", "YCbCr": "YCbCr", "LAB": "Lab", "HSV": "HSV", "P": "palette", "PA": "palette",
          "L": "grey", "LA": "grey", "1": "black and white", "I": "grey of more than 8 bits", "RGB;16": "16 bits",
          "RGBA;16": "16 bits",
          **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N", "L;16", "LA;16"), "grey of 16 bits")}


def _shown(inventory: Inventory) -> Iterator[Finding]:
    looks = inventory.looks
    plain = {name: f"{look.colour_share:.0%} is {look.colour}" for name, look in looks.items()
             if look.colour_share >= ONE_COLOUR}
    if plain:
        yield Finding(Level.NOTE, "one colour", f"{are(plain, 'picture')} mostly of one colour", "", plain)
    blurred = {name: f"sharpness {sharpness(look):.4f}" for name, look in looks.items()
               if name not in plain and look.contrast > PLAIN_GREYS and sharpness(look) < BLURRED}
    if blurred:
        yield Finding(Level.NOTE, "blurred", f"{are(blurred, 'picture')} blurred, or smooth all over: the variance of "
                      f"the Laplacian is less than {BLURRED} of the greys'", "", blurred)


def sharpness(look: Look) -> float:
    """The Laplacian's variance beside that of the greys themselves: the same for the same picture of less contrast."""
    return look.laplacian / max(look.contrast, 1e-9)


# --- words -------------------------------------------------------------------------------------------------


def number(count: int, noun: str) -> str:
    """1 picture, 2 pictures."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def are(names: Mapping[str, object], noun: str) -> str:
    """1 picture is, 2 pictures are."""
    return f"{number(len(names), noun)} {'is' if len(names) == 1 else 'are'}"
