"""Everything that is known of a folder before a run: its pictures, their captions and cuts, and what cannot be used.

What a run refuses is told by the functions that a run refuses with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from impasto.core.progress import SILENT, Reporter
from impasto.data.buckets import Placement, bucket_sizes, check_sizes, cuts
from impasto.data.captions import read_captions
from impasto.data.dataset import Listing, Problem, Size, check_folder, list_folder, located, memory_of
from impasto.data.looks import Look, look_over
from impasto.data.masks import read_masks
from impasto.data.options import DataOptions, PriorOptions, of_class_pictures
from impasto.data.pairs import read_sources, set_apart
from impasto.data.phrasing import Phrasing
from impasto.data.sets import DataSets, label
from impasto.data.wording import count_chunks, file_oddities

#: side of a latent cell in pixels, of all of Stable Diffusion's VAEs
CELL = 8


@dataclass(frozen=True)
class Inventory:
    """A folder's files and all facts about them, by the pictures' names."""

    title: str  # pictures, pictures of data.1, or class pictures
    listing: Listing
    data: DataOptions
    batch: int  # pictures in a micro-batch
    looks: dict[str, Look]  # of pictures that can be decoded
    problems: list[Problem]  # pictures that cannot
    placements: dict[str, Placement | None]  # None: too small
    captions: dict[str, str]  # as they are read
    caption_problems: list[Problem]  # of pictures, or of captions' files
    chunks: dict[str, int] = field(default_factory=dict)  # of a caption in the text encoder
    caption_files: dict[str, list[str]] = field(default_factory=dict)  # what is unusual about a caption's file
    overruled: dict[str, str] = field(default_factory=dict)  # pictures of which two files say different things
    unread: dict[str, str] = field(default_factory=dict)  # files of captions that are not read, and why
    cut: dict[str, str] = field(default_factory=dict)  # what data.max_tokens leaves out of a picture's caption
    more_cuts: dict[str, list[Placement]] = field(default_factory=dict)  # at smaller resolutions
    of_class: bool = False  # [prior]'s
    mask_problems: list[Problem] = field(default_factory=list)  # of pictures
    pair_problems: list[Problem] = field(default_factory=list)  # likewise
    masked: int = 0  # pictures with a mask
    company: Counter[Size] = field(default_factory=Counter)  # uses of other sets' pictures in an epoch, by bucket

    @property
    def phrasing(self) -> Phrasing:
        """What is done with the captions."""
        return Phrasing.of(self.data)

    @property
    def uses(self) -> Counter[Size]:
        """How often pictures of each bucket come in an epoch."""
        return Counter(placement.bucket for placement in self.all_cuts for _ in range(self.data.repeats))

    @property
    def all_cuts(self) -> list[Placement]:
        """The cuts of all pictures at all resolutions."""
        return [*self.placed.values(), *(placement for more in self.more_cuts.values() for placement in more)]

    @property
    def placed(self) -> dict[str, Placement]:
        """The cuts of the pictures that are large enough, each at its largest resolution."""
        return {name: placement for name, placement in self.placements.items() if placement is not None}


def take_inventories(data: DataOptions | DataSets, prior: PriorOptions | None, batch: int,
                     report: Reporter = SILENT) -> list[Inventory]:
    """The inventory of each set's folder, and of `[prior]`'s where it names one. The drawn world has none.

    Raises `UserError` for a folder that is missing or empty and for sizes that no base could have.
    """
    folders: list[tuple[str, str, DataOptions]] = []
    for number, one in enumerate(data.sets):
        check_sizes(one, CELL, label(number, data))
        if one.source == "folder":
            title = f"pictures of {label(number, data)}" if len(data.sets) > 1 else "pictures"
            folders.append((title, check_folder(one.folder, f"{label(number, data)}.folder"), one))
    own = len(folders)
    if prior is not None and prior.folder is not None:
        folders.append(("class pictures", prior.folder, of_class_pictures(data.sets[0], prior)))
    listings = [(title, list_folder(located(folder)), options) for title, folder, options in folders]
    found = [take_inventory(listing, options, batch, report, title) for title, listing, options in listings]
    whole = sum((each.uses for each in found[:own]), Counter[Size]())
    return [replace(each, of_class=place >= own, company=Counter() if place >= own else whole - each.uses)
            for place, each in enumerate(found)]


def take_inventory(listing: Listing, data: DataOptions, batch: int, report: Reporter = SILENT,
                   title: str = "pictures") -> Inventory:
    """Look at every file of a folder, or remember it from last time."""
    listing = set_apart(listing, data)
    looks, problems = look_over(listing, memory_of(listing.folder), report, title)
    sized = [(one, bucket_sizes(one)) for one in data.by_resolution]
    found = {name: cuts(look.size, sized) for name, look in looks.items()}
    placements = {name: own[-1] if own else None for name, own in found.items()}
    captions, phrasing = read_captions(listing, data), Phrasing.of(data)
    sizes = {name: look.size for name, look in looks.items()}
    masks, maskless = read_masks(listing, sizes, data, report)
    said = {text: phrasing.plain(text) for text in captions.texts.values()}
    chunks = dict(zip(said, count_chunks(list(said.values())), strict=True))
    lost = {text: phrasing.lost(text) for text in said} if data.max_tokens is not None else {}
    files = {} if data.caption is not None else _odd_files(listing, data.wildcards)
    return Inventory(title, listing, data, batch, looks, problems, placements, captions.texts, captions.problems,
                     {name: chunks[text] for name, text in captions.texts.items()}, files, captions.overruled,
                     captions.unread, {name: lost[text] for name, text in captions.texts.items() if lost.get(text)},
                     more_cuts={name: own[:-1] for name, own in found.items() if own[1:]}, mask_problems=maskless,
                     pair_problems=read_sources(listing, sizes, data, report)[1], masked=len(masks))


def _odd_files(listing: Listing, lines: bool) -> dict[str, list[str]]:
    """What is unusual about files of text; `lines`: several lines are not."""
    found = {}
    for name in listing.captions:
        if name.lower().endswith(".json"):
            continue
        try:
            odd = file_oddities((listing.folder / name).read_bytes())
        except OSError:
            continue  # is among the problems already
        if odd := [kind for kind in odd if not (lines and kind == "several lines")]:
            found[name] = odd
    return found
