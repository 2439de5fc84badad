"""Everything that is known of a folder before a run: its pictures, their captions and cuts, and what cannot be used.

What a run refuses is told by the functions that a run refuses with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from impasto.core.progress import SILENT, Reporter
from impasto.data.buckets import Placement, bucket_sizes, check_sizes, place
from impasto.data.captions import captions
from impasto.data.dataset import Listing, Problem, list_folder, located, memory_of
from impasto.data.looks import Look, look_over
from impasto.data.options import DataOptions, PriorOptions
from impasto.data.wording import count_chunks, file_oddities

#: side of a latent cell in pixels, of all of Stable Diffusion's VAEs
CELL = 8


@dataclass(frozen=True)
class Inventory:
    """A folder's files and all facts about them, by the pictures' names."""

    title: str  # pictures, or class pictures
    listing: Listing
    data: DataOptions
    batch: int  # pictures in a micro-batch
    looks: dict[str, Look]  # of pictures that can be decoded
    problems: list[Problem]  # pictures that cannot
    placements: dict[str, Placement | None]  # None: too small
    captions: dict[str, str]
    caption_problems: list[Problem]  # of pictures, or of captions' files
    chunks: dict[str, int] = field(default_factory=dict)  # of a caption in the text encoder
    caption_files: dict[str, list[str]] = field(default_factory=dict)  # what is unusual about a .txt file

    @property
    def placed(self) -> dict[str, Placement]:
        """The cuts of the pictures that are large enough."""
        return {name: placement for name, placement in self.placements.items() if placement is not None}


def take_inventories(data: DataOptions, prior: PriorOptions | None, batch: int,
                     report: Reporter = SILENT) -> list[Inventory]:
    """The inventory of `[data]`'s folder, and of `[prior]`'s where it names one.

    Raises `UserError` for a folder that is missing or empty and for sizes that no base could have.
    """
    check_sizes(data, CELL)
    assert data.folder is not None, "the drawn world has no folder"
    folders = [("pictures", located(data.folder), data)]
    if prior is not None and prior.folder is not None:
        folders.append(("class pictures", located(prior.folder), data.model_copy(update={"caption": prior.caption})))
    listings = [(title, list_folder(folder), options) for title, folder, options in folders]
    return [take_inventory(listing, options, batch, report, title) for title, listing, options in listings]


def take_inventory(listing: Listing, data: DataOptions, batch: int, report: Reporter = SILENT,
                   title: str = "pictures") -> Inventory:
    """Look at every file of a folder, or remember it from last time."""
    looks, problems = look_over(listing, memory_of(listing.folder), report, title)
    buckets = bucket_sizes(data)
    placements = {name: place(look.size, data, buckets) for name, look in looks.items()}
    texts, caption_problems = captions(listing, data)
    distinct = list(dict.fromkeys(texts.values()))
    chunks = dict(zip(distinct, count_chunks(distinct), strict=True))
    files = {} if data.caption is not None else _odd_files(listing)
    return Inventory(title, listing, data, batch, looks, problems, placements, texts, caption_problems,
                     {name: chunks[text] for name, text in texts.items()}, files)


def _odd_files(listing: Listing) -> dict[str, list[str]]:
    found = {}
    for name in listing.captions:
        try:
            odd = file_oddities((listing.folder / name).read_bytes())
        except OSError:
            continue  # is among the problems already
        if odd:
            found[name] = odd
    return found
