"""Pictures as a run uses them: each with its caption, its cut, and what is done with it in each use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from impasto.core.progress import Reporter
from impasto.data.account import unused
from impasto.data.augment import Augment, Variant
from impasto.data.buckets import Placement, bucket_sizes, cuts, too_small
from impasto.data.captions import read_captions
from impasto.data.dataset import Listing, Picture, Problem, memory_of, refuse, survey
from impasto.data.drawn import Drawn
from impasto.data.masks import Mask, read_masks
from impasto.data.options import DataOptions
from impasto.data.pairs import read_sources, set_apart
from impasto.data.phrasing import PLAIN, Phrasing


@dataclass(frozen=True)
class Handling:
    """What a set's options say of each use of its pictures."""

    flip: bool = False
    background: str = "white"
    caption_dropout: float = 0.0
    number: int = 0  # of the set
    augment: Augment = Augment()
    mask_floor: float = 0.0
    mask_normalised: bool = False
    holes: int = 4  # random ones of each picture, for a base for inpainting
    hole_of_mask: bool = False  # its own mask in place of them, which then does not weigh the loss
    source_dropout: float = 0.0
    both_dropout: float = 0.0

    @classmethod
    def of(cls, data: DataOptions, number: int = 0) -> Handling:
        """The handling that set `number` asks for."""
        return cls(data.flip, data.background, data.caption_dropout, number, Augment.of(data), data.mask_floor,
                   data.mask_normalised, data.inpaint_masks, data.inpaint == "mask", data.source_dropout,
                   data.both_dropout)

    @property
    def flips(self) -> tuple[bool, ...]:
        """Mirrored or not: what a use may be."""
        return (False, True) if self.flip else (False,)


@dataclass(frozen=True)
class Item:
    """One picture as the run uses it: a fact for reports, and the way to its batch."""

    picture: Picture
    caption: str  # as it was read
    placement: Placement
    weight: float  # of its loss, all in all
    latent_keys: tuple[str, ...] = ()  # of each variant, plain, then mirrored; empty if the step encodes pictures
    text_keys: Mapping[str, str] = field(default_factory=dict)  # by what may be said; empty if the step encodes it
    labels: tuple[int, ...] = ()  # what is known of it beside its caption; only the drawn world tells
    phrasing: Phrasing = PLAIN  # what is done with its caption
    handling: Handling = Handling()  # what is done with it
    mask: Mask | None = None  # which parts of it count; None: all
    own_weight: float = 1.0  # what of the weight is by its own file and its caption
    mask_keys: tuple[str, ...] = ()  # of each variant's cells, not mirrored; empty without a mask that weighs
    source: Picture | None = None  # what it is made of, of a pair
    extra_keys: tuple[str, ...] = ()  # what is shown beside each variant, plain, then mirrored: its versions in turn

    @property
    def own_facts(self) -> tuple[object, ...]:
        """What is its own beside content, caption and cut, for fingerprints; nothing of most pictures."""
        handling, mask = self.handling, self.mask
        weighs: tuple[object, ...] = () if self.own_weight == 1 else ("weighs", self.own_weight)
        if self.source is not None:
            weighs = (*weighs, "made of", self.source.digest)
        if handling.hole_of_mask or handling.holes != Handling().holes:
            weighs = (*weighs, "holes", handling.hole_of_mask, handling.holes)
        return weighs if mask is None else (*weighs, mask.digest, mask.alpha, handling.mask_floor,
                                            handling.mask_normalised)

    def variant(self, number: int) -> Variant:
        """One of the ways in which the run shows it."""
        return self.handling.augment.variant(self.placement, self.picture.digest, number)


def unweighed(item: Item) -> Item:
    """A held-out picture: all of them weigh the same."""
    return replace(item, weight=1.0, own_weight=1.0)


def draw_world(data: DataOptions, seed: int, count: int, number: int = 0) -> list[Item]:
    """The drawn world's first pictures, each made when it is read: none of them is ever a file."""
    whole = (data.resolution, data.resolution)
    phrasing, handling = Phrasing.of(data), Handling.of(data, number)
    return [Item(picture, picture.caption, Placement(whole, whole, (0, 0), whole),
                 data.loss_weight * data.caption_weight(picture.caption), labels=picture.labels, phrasing=phrasing,
                 handling=handling, own_weight=data.caption_weight(picture.caption))
            for picture in (Drawn.number(i, data.resolution, seed, data.doodles) for i in range(count))]


def collect(listing: Listing, data: DataOptions, report: Reporter, title: str = "pictures",
            weight: float = 1.0, notes: list[str] | None = None, number: int = 0) -> list[Item]:
    """All pictures of a folder with captions and cuts, as those of set `number`, or one `UserError` with all that is
    wrong. At several resolutions a picture is there several times, at the smallest one first.

    What is there and not used is told in `notes`.
    """
    listing = set_apart(listing, data)
    pictures, problems = survey(listing, memory_of(listing.folder), report, title)
    captions = read_captions(listing, data)
    sizes = {picture.name: picture.size for picture in pictures}
    masks, maskless = read_masks(listing, sizes, data, report)
    sources, alone = read_sources(listing, sizes, data, report)
    phrasing, handling = Phrasing.of(data), Handling.of(data, number)
    sized = [(one, bucket_sizes(one)) for one in data.by_resolution]
    items = []
    for picture in pictures:
        placements = cuts(picture.size, sized)
        if not placements:
            problems.append(Problem(picture.name, too_small(picture.size, data)))
        elif picture.name in captions.texts:
            caption = captions.texts[picture.name]
            own = captions.weights.get(picture.name, 1.0) * data.caption_weight(caption)
            items += [Item(picture, caption, placement, weight * own, phrasing=phrasing, handling=handling,
                           mask=masks.get(picture.name), own_weight=own, source=sources.get(picture.name))
                      for placement in placements]
    of_files = [*problems, *captions.problems, *alone]
    refuse([*of_files, *maskless], listing.folder, "" if of_files else
           "mend masks that are wrong; pictures without one count in full with data.missing_masks=whole")
    if notes is not None:
        notes += unused(listing, data, captions)
    return items
