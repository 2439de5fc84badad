"""From a folder to batches: what a run learns from, prepared once, then a pure function of the step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import final

import torch

from impasto.core.progress import SILENT, Reporter
from impasto.core.rng import seed_for
from impasto.data.account import account, unused, wordings
from impasto.data.buckets import Placement, bucket_sizes, check_sizes, cut, place, too_small
from impasto.data.cache import Cache, key_of
from impasto.data.captions import read_captions
from impasto.data.dataset import Listing, Picture, Problem, list_folder, located, memory_of, refuse, survey
from impasto.data.drawn import Drawn
from impasto.data.encoding import Encoding
from impasto.data.frontier import READS, Frontier, frontier
from impasto.data.heldout import beyond, divide
from impasto.data.many import Many, Stream
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions, of_class_pictures
from impasto.data.order import Order
from impasto.data.phrasing import PLAIN, Phrasing
from impasto.data.prior import draw_prior
from impasto.data.shards_cache import Packs
from impasto.families.base import Base, Geometry, TextStates
from impasto.mini.labels import LABEL_SIZES
from impasto.objectives.batch import Batch

#: pictures of a batch that are read and decoded at once, where the step encodes them
DECODERS = 4


@dataclass(frozen=True)
class Item:
    """One picture as the run uses it: a fact for reports, and the way to its batch."""

    picture: Picture
    caption: str  # as it was read
    placement: Placement
    weight: float  # of its loss
    latent_keys: tuple[str, ...] = ()  # plain, then mirrored; empty if the step encodes pictures
    text_keys: Mapping[str, str] = field(default_factory=dict)  # by what may be said; empty if the step encodes it
    labels: tuple[int, ...] = ()  # what is known of it beside its caption; only the drawn world tells
    phrasing: Phrasing = PLAIN  # what is done with its caption


@dataclass(frozen=True)
class Share:
    """How an optimizer step is divided, and which part of it is this process's."""

    batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def group(self) -> int:
        """Pictures of one micro-batch, over all ranks."""
        return self.batch_size * self.world

    @property
    def places(self) -> range:
        """This rank's places in a micro-batch."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)


@final
@dataclass
class Source:
    """What the trainer draws its batches from. Of the base it keeps `stack_text` alone."""

    pictures: Sequence[Item]  # in the order of their names; of shards, in theirs
    class_pictures: tuple[Item, ...]  # empty without [prior]
    data: DataOptions
    rule: Frontier
    share: Share
    cache: Cache
    stack_text: Callable[[Sequence[TextStates]], TextStates]
    no_caption: str = ""  # the key of the empty caption's states, where captions are dropped and cached
    label_sizes: tuple[int, ...] = ()  # how many values each of the items' labels has
    varied: bool = False  # captions are encoded in the step since chance makes too many of them
    notes: list[str] = field(default_factory=list)  # what lies in the folder and is not used
    held_out: Sequence[Item] = ()  # pictures that are only looked at to validate, in the order of their names

    def __post_init__(self) -> None:
        def stream(items: Sequence[Item], name: str) -> tuple[Sequence[Item], Stream]:
            if isinstance(items, Many):
                return items, items.order(self.share.group, self.share.seed, name)
            sizes = [item.placement.bucket for item in items]
            return items, Order.over(sizes, self.share.group, self.share.seed, name)

        self._streams = [stream(self.pictures, "pictures")]
        if self.class_pictures:
            self._streams.append(stream(self.class_pictures, "class pictures"))
        self._ahead: dict[int, Future[list[list[Batch]]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="pictures")

    @property
    def needs(self) -> frozenset[str]:
        """Components that the step needs beside the denoiser, since they encode in it."""
        return self.rule.needs

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in which every picture comes at least once."""
        return -(-self._streams[0][1].epoch_length // self.share.accumulation)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of contents, captions and cuts, in order: equal where a run may go on."""
        return data_fingerprint(self.data, [items for items, _ in self._streams])

    # --- batches -----------------------------------------------------------------------------------------
    def micro_batches(self, step: int) -> list[list[Batch]]:
        """The micro-batches of optimizer step `step` (from 0): a pure function of it.

        Each is a list of batches of one shape each: pictures, with as many class pictures on top. The next
        step's are read in the background meanwhile.
        """
        waiting = self._ahead.pop(step, None)
        batches = self._read(step) if waiting is None else waiting.result()
        self._ahead = {step + 1: self._reader.submit(self._read, step + 1)}
        return batches

    def _read(self, step: int) -> list[list[Batch]]:
        return [self._micro_batch(step, micro) for micro in range(self.share.accumulation)]

    def _micro_batch(self, step: int, micro: int) -> list[Batch]:
        """This rank's part of a micro-batch. Samples count the step's pictures, then its class pictures."""
        group, accumulation = self.share.group, self.share.accumulation
        by_shape: dict[tuple[int, int], list[tuple[int, Item]]] = {}
        for kind, (items, order) in enumerate(self._streams):
            chosen = order.micro_batch(step * accumulation + micro)
            for spot in self.share.places:
                item, sample = items[chosen[spot]], (kind * accumulation + micro) * group + spot
                by_shape.setdefault(item.placement.bucket, []).append((sample, item))
        return [self._batch(step, *zip(*entries, strict=True)) for entries in by_shape.values()]

    def _batch(self, step: int, samples: Sequence[int], items: Sequence[Item]) -> Batch:
        """A batch of items of one shape, at these places of the effective batch."""
        flips = [self.data.flip and seed_for(self.share.seed, step, s, "flip") % 2 == 1 for s in samples]
        said = [self.says(item, step, sample) for item, sample in zip(items, samples, strict=True)]
        return self._made(samples, items, flips, said)

    def validation_batch(self, places: Sequence[int]) -> Batch:
        """Held-out pictures of one shape, by their places in `held_out`: as they are, with their whole captions."""
        items = [self.held_out[place] for place in places]
        said = [item.phrasing.plain(item.caption) for item in items]
        return self._made(places, items, [False] * len(items), said)

    def _made(self, samples: Sequence[int], items: Sequence[Item], flips: Sequence[bool],
              said: Sequence[str]) -> Batch:
        """A batch of items, mirrored or not, of which this is said."""
        placements = [item.placement.flipped() if flip else item.placement
                      for item, flip in zip(items, flips, strict=True)]
        geometry = Geometry(original=torch.tensor([p.original for p in placements]),
                            crop=torch.tensor([p.crop for p in placements]),
                            target=torch.tensor([p.bucket for p in placements]))
        batch = Batch(list(samples), [item.picture.name for item in items],
                      torch.tensor([item.weight for item in items]), geometry=geometry)
        if self.label_sizes:
            batch.labels = torch.tensor([item.labels for item in items])
        if self.rule.latents:
            keys = [item.latent_keys[flip] for item, flip in zip(items, flips, strict=True)]
            batch.moments = torch.cat([entry["moments"] for entry in self.cache.load_all(keys)])
        elif self.rule.pixels:
            batch.pixels = torch.stack(list(self._decoders.map(
                lambda item, flip: cut(item.picture.read(self.data.background), item.placement, flip), items, flips)))
        if self.rule.text:
            keys = [item.text_keys[words] if words else self.no_caption or item.text_keys[""]
                    for item, words in zip(items, said, strict=True)]
            batch.text = self.stack_text(self.cache.load_all(keys))
        elif self.rule.captions:
            batch.captions = [item.phrasing.encoded_as(words) for item, words in zip(items, said, strict=True)]
        return batch

    def says(self, item: Item, step: int, sample: int) -> str:
        """A picture's caption in one use: a function of the seed, the step and its place in the batch."""
        if self.drops(step, sample):
            return ""
        return item.phrasing.say(item.caption, functools.partial(seed_for, self.share.seed, step, sample, "caption"))

    def drops(self, step: int, sample: int) -> bool:
        """Whether a sample's caption is left out in this step."""
        share = self.data.caption_dropout
        return share > 0 and seed_for(self.share.seed, step, sample, "caption") / 2**63 < share

    # --- what the user is told ---------------------------------------------------------------------------
    def describe(self) -> list[str]:
        """Every picture accounted for, in a few lines."""
        buckets = bucket_sizes(self.data)
        lines = account("pictures", self.pictures, buckets)
        if self.class_pictures:
            lines += account("class pictures", self.class_pictures, buckets)
        if self.held_out:
            lines += account("held-out pictures", self.held_out, buckets)
        trained = "as their encoder is trained"
        encoded = [f"{what} are encoded {'once' if once else f'in each step, {why}'}" for what, once, live, why in (
            ("pictures", self.rule.latents, self.rule.pixels, trained),
            ("captions", self.rule.text, self.rule.captions, "as they vary" if self.varied else trained))
            if once or live]
        length = self.epoch_steps
        return [*lines, *wordings(self.pictures), *self.notes, "; ".join(encoded),
                f"an epoch is {length} step{'s' if length > 1 else ''}"]


def data_fingerprint(data: DataOptions, streams: Sequence[Sequence[Item]]) -> str:
    """`Source.fingerprint` of pictures, and of class pictures if there are any."""
    phrasing = Phrasing.of(data).facts
    return key_of(data.flip, data.background,
                  [items.facts if isinstance(items, Many) else
                   [(item.picture.digest, item.caption, item.placement) for item in items] for items in streams],
                  *([phrasing] if phrasing else []))


# --- preparing ---------------------------------------------------------------------------------------------


def prepare_source(base: Base, data: DataOptions, prior: PriorOptions | None, *, trains: frozenset[str],
                   batch_size: int, accumulation: int, seed: int, device: torch.device | str,
                   reads: frozenset[str] = READS, report: Reporter = SILENT, rank: int = 0, world: int = 1,
                   validation: ValidationOptions | None = None) -> Source:
    """Look at every picture, draw or collect class pictures, encode what may be encoded once.

    `trains` names the components that are trained, `reads` what the objective looks at. Without `validation` no
    picture is held out.
    Nothing may be attached to the base yet: class pictures
    are drawn with the base as it is. Raises one `UserError` with all files of a folder that cannot be used.
    """
    share = Share(batch_size, accumulation, seed, rank, world)
    check_sizes(data, base.cell)
    fingerprint = base.fingerprint()
    notes: list[str] = []
    items, held_out = pictures_of(data, validation, seed, report, notes)
    class_items: Sequence[Item] = []
    if prior is not None:
        class_data = of_class_pictures(data, prior)
        listing = list_folder(located(prior.folder)) if prior.folder is not None else \
            draw_prior(base, fingerprint, prior, data.resolution, report, rank, world)
        class_items = collect(listing, class_data, report, "class pictures", prior.weight, notes)
    many = data.wildcards and any(item.phrasing.variants(item.caption) is None
                                  for item in itertools.chain(items, class_items))
    rule = frontier(trains, base.text_encoder_names, data, reads, many=many)
    cache = (Packs if data.source == "shards" else Cache).at(data.cache)
    encoding = Encoding(base, fingerprint, cache, data, rule, torch.device(device))
    items, class_items, held_out = encoding.keyed(items), encoding.keyed(class_items), encoding.keyed_plain(held_out)
    no_caption = encoding.caption("") if data.caption_dropout else ""
    encoding.run(report, rank, world)
    return Source(_kept(items), tuple(class_items), data, rule, share, cache, base.stack_text, no_caption,
                  LABEL_SIZES if data.source == "world" else (), notes=notes,
                  varied=rule.captions and not set(base.text_encoder_names) & trains, held_out=_kept(held_out))


def _kept(items: Sequence[Item]) -> Sequence[Item]:
    return items if isinstance(items, Many) else tuple(items)


def pictures_of(data: DataOptions, validation: ValidationOptions | None, seed: int, report: Reporter = SILENT,
                notes: list[str] | None = None) -> tuple[Sequence[Item], Sequence[Item]]:
    """The pictures to learn from, and those that are held out. Raises `UserError` as `collect` and `divide` do."""
    if data.source == "world":
        assert data.pictures is not None
        drawn = draw_world(data, seed, data.pictures + beyond(data.pictures, validation))
        return drawn[:data.pictures], drawn[data.pictures:]
    if data.source == "shards":
        from impasto.data.shards_items import shard_items  # its items are `Item`s too

        items: Sequence[Item] = shard_items(data, report, notes)
    else:
        items = collect(list_folder(located(str(data.folder))), data, report, notes=notes)
    if validation is None:
        return items, []
    own = None if validation.folder is None else \
        collect(list_folder(located(validation.folder)), data, report, "held-out pictures", notes=notes)
    items, held_out, told = divide(items, own, validation, seed)
    if notes is not None:
        notes += told
    return items, held_out


def draw_world(data: DataOptions, seed: int, count: int) -> list[Item]:
    """The drawn world's first pictures, each made when it is read: none of them is ever a file."""
    whole = (data.resolution, data.resolution)
    phrasing = Phrasing.of(data)
    return [Item(picture, picture.caption, Placement(whole, whole, (0, 0), whole), 1.0, labels=picture.labels,
                 phrasing=phrasing)
            for picture in (Drawn.number(i, data.resolution, seed, data.doodles) for i in range(count))]


def collect(listing: Listing, data: DataOptions, report: Reporter, title: str = "pictures",
            weight: float = 1.0, notes: list[str] | None = None) -> list[Item]:
    """All pictures of a folder with captions and cuts, or one `UserError` with all that is wrong.

    What is there and not used is told in `notes`.
    """
    pictures, problems = survey(listing, memory_of(listing.folder), report, title)
    captions = read_captions(listing, data)
    buckets, phrasing = bucket_sizes(data), Phrasing.of(data)
    items = []
    for picture in pictures:
        placement = place(picture.size, data, buckets)
        if placement is None:
            problems.append(Problem(picture.name, too_small(picture.size, data)))
        elif picture.name in captions.texts:
            items.append(Item(picture, captions.texts[picture.name], placement, weight, phrasing=phrasing))
    refuse([*problems, *captions.problems], listing.folder)
    if notes is not None:
        notes += unused(listing, data, captions)
    return items
