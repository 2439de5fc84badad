"""From a folder to batches: what a run learns from, prepared once, then a pure function of the step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import final

import torch

from impasto.core.progress import SILENT, Reporter
from impasto.core.rng import seed_for
from impasto.data.account import accounts, of_set, unread, wordings
from impasto.data.augment import Variant
from impasto.data.beside import Example, example, in_batch, versions, wanted
from impasto.data.buckets import check_sizes
from impasto.data.cache import Cache
from impasto.data.encoding import Encoding
from impasto.data.frontier import READS, Frontier, frontier
from impasto.data.items import Item, collect
from impasto.data.many import Many, Stream
from impasto.data.masks import cell_weights
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions, of_class_pictures
from impasto.data.order import Order
from impasto.data.pictures import Pictures, data_fingerprint, pictures_of
from impasto.data.prior import draw_prior
from impasto.data.sets import DataSets, cache_folder, label
from impasto.data.shards.cache import Packs
from impasto.data.shares import SharedOrder
from impasto.families.base import Base, Geometry, TextStates
from impasto.mini.labels import LABEL_SIZES, NOTHING
from impasto.objectives.batch import Batch

#: pictures of a batch that are read and decoded at once, where the step encodes them
DECODERS = 4


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

    pictures: Sequence[Item]  # set by set, in the order of their names; of shards, in theirs
    class_pictures: tuple[Item, ...]  # empty without [prior]
    data: DataOptions | DataSets
    rule: Frontier
    share: Share
    cache: Cache
    stack_text: Callable[[Sequence[TextStates]], TextStates]
    no_caption: str = ""  # the key of the empty caption's states, where captions are dropped and cached
    label_sizes: tuple[int, ...] = ()  # how many values each of the items' labels has
    varied: bool = False  # captions are encoded in the step since chance makes too many of them
    notes: list[str] = field(default_factory=list)  # what lies in the folder and is not used
    held_out: Sequence[Item] = ()  # pictures that are only looked at to validate, likewise

    def __post_init__(self) -> None:
        self._streams = [self._stream()]
        if self.class_pictures:
            sizes = [item.placement.bucket for item in self.class_pictures]
            order = Order.over(sizes, self.share.group, self.share.seed, "class pictures")
            self._streams.append((self.class_pictures, order))
        self._ahead: dict[int, Future[list[list[Batch]]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="pictures")

    def _stream(self) -> tuple[Sequence[Item], Stream]:
        """The pictures, each as often as it comes in an epoch, and their order."""
        sets, group, seed = self.data.sets, self.share.group, self.share.seed
        if isinstance(self.pictures, Many):
            return self.pictures, self.pictures.order(group, seed, "pictures")
        shares = [one.share for one in sets if one.share is not None]
        if shares:
            places = [(item.placement.bucket, item.handling.number) for item in self.pictures]
            return self.pictures, SharedOrder.over(places, shares, group, seed, "pictures")
        items = [item for item in self.pictures for _ in range(sets[item.handling.number].repeats)]
        return items, Order.over([item.placement.bucket for item in items], group, seed, "pictures")

    @property
    def needs(self) -> frozenset[str]:
        """Components that the step needs beside the denoiser, since they encode in it."""
        return self.rule.needs

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in which every picture comes as often as its set says, or, of sets with shares, about once
        at least."""
        return -(-self._streams[0][1].epoch_length // self.share.accumulation)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of contents, captions and cuts, in order: equal where a run may go on."""
        return data_fingerprint(self.data, [self.pictures, *([self.class_pictures] if self.class_pictures else [])])

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
        flips = [item.handling.flip and seed_for(self.share.seed, step, s, "flip") % 2 == 1
                 for item, s in zip(items, samples, strict=True)]
        numbers = [seed_for(self.share.seed, step, s, "variant") % item.handling.augment.variants
                   for item, s in zip(items, samples, strict=True)]
        said = [self.says(item, step, sample) for item, sample in zip(items, samples, strict=True)]
        shown = [item.variant(number) for item, number in zip(items, numbers, strict=True)]
        keys = [item.latent_keys[number * len(item.handling.flips) + flip] if self.rule.latents else ""
                for item, number, flip in zip(items, numbers, flips, strict=True)]
        masks = [item.mask_keys[number] if item.mask_keys else ""
                 for item, number in zip(items, numbers, strict=True)]
        beside = [(item.extra_keys[self._which(item, step, s, number, flip)], self.keeps_source(item, step, s))
                  for item, s, number, flip in zip(items, samples, numbers, flips, strict=True)
                  if self.rule.extras]
        return self._made(samples, items, shown, flips, keys, said, masks, beside)

    def _which(self, item: Item, step: int, sample: int, number: int, flip: bool) -> int:
        """The place of what is shown beside an item in one use, among its `extra_keys`."""
        count = versions(item, self.rule.extras)
        version = seed_for(self.share.seed, step, sample, "hole") % count
        return (number * len(item.handling.flips) + flip) * count + version

    def validation_batch(self, places: Sequence[int]) -> Batch:
        """Held-out pictures of one shape, by their places in `held_out`: as they are, with their whole captions."""
        items = [self.held_out[place] for place in places]
        said = [item.phrasing.plain(item.caption) for item in items]
        keys = [item.latent_keys[0] if self.rule.latents else "" for item in items]
        masks = [item.mask_keys[0] if item.mask_keys else "" for item in items]
        beside = [(item.extra_keys[0], True) for item in items if self.rule.extras]
        return self._made(places, items, [Variant(item.placement) for item in items], [False] * len(items), keys, said,
                          masks, beside)

    def _made(self, samples: Sequence[int], items: Sequence[Item], shown: Sequence[Variant], flips: Sequence[bool],
              keys: Sequence[str], said: Sequence[str], masks: Sequence[str], beside: Sequence[tuple[str, bool]]
              ) -> Batch:
        """A batch of items, shown so, mirrored or not, of which this is said; `keys` are those of cached moments,
        `masks` those of cut masks, empty for pictures without one; `beside`: the key of what is shown beside each, and
        whether it is, empty where nothing is."""
        placements = [variant.placement.flipped() if flip else variant.placement
                      for variant, flip in zip(shown, flips, strict=True)]
        geometry = Geometry(original=torch.tensor([p.original for p in placements]),
                            crop=torch.tensor([p.crop for p in placements]),
                            target=torch.tensor([p.bucket for p in placements]))
        batch = Batch(list(samples), [item.picture.name for item in items],
                      torch.tensor([item.weight for item in items]), geometry=geometry)
        if any(masks):
            batch.mask = self._mask(items, masks, flips)
        if self.label_sizes:
            batch.labels = torch.tensor([item.labels or NOTHING for item in items])
        if self.rule.latents:
            batch.moments = torch.cat([entry["moments"] for entry in self.cache.load_all(keys)])
        elif self.rule.pixels:
            batch.pixels = torch.stack(list(self._decoders.map(
                lambda item, variant, flip: variant.show(item.picture.read(item.handling.background), flip),
                items, shown, flips)))
        if beside:
            batch.extras = in_batch(self.cache.load_all([key for key, _ in beside]), self.rule.extras,
                                    [kept for _, kept in beside])
        if self.rule.text:
            texts = [item.text_keys[words] if words else self.no_caption or item.text_keys[""]
                    for item, words in zip(items, said, strict=True)]
            batch.text = self.stack_text(self.cache.load_all(texts))
        elif self.rule.captions:
            batch.captions = [item.phrasing.encoded_as(words) for item, words in zip(items, said, strict=True)]
        return batch

    def _mask(self, items: Sequence[Item], keys: Sequence[str], flips: Sequence[bool]) -> torch.Tensor:
        """What each latent cell of each picture counts, (B, 1, h, w); 1 all over where there is no mask."""
        loaded = iter(self.cache.load_all([key for key in keys if key]))
        white = [next(loaded)["mask"] if key else None for key in keys]
        whole = torch.ones_like(next(mask for mask in white if mask is not None))
        return torch.stack([whole if mask is None else cell_weights(
            mask.flip(-1) if flip else mask, item.handling.mask_floor, item.handling.mask_normalised)
            for item, mask, flip in zip(items, white, flips, strict=True)])

    def says(self, item: Item, step: int, sample: int) -> str:
        """A picture's caption in one use: a function of the seed, the step and its place in the batch."""
        share = item.handling.caption_dropout + item.handling.both_dropout
        if share > 0 and seed_for(self.share.seed, step, sample, "caption") / 2**63 < share:
            return ""
        return item.phrasing.say(item.caption, functools.partial(seed_for, self.share.seed, step, sample, "caption"))

    def keeps_source(self, item: Item, step: int, sample: int) -> bool:
        """Whether the picture that another is made of is shown in one use: by the draw that drops captions, of which
        the parts without caption, without either and without the picture lie side by side (as in diffusers)."""
        alone, rest = item.handling.caption_dropout, item.handling.both_dropout + item.handling.source_dropout
        return rest <= 0 or not alone <= seed_for(self.share.seed, step, sample, "caption") / 2**63 < alone + rest

    def captions(self) -> Iterator[str]:
        """What may be said of each picture to learn from: all that chance may make of it, or its whole text where that
        is endless. Each is looked up when it is asked for."""
        return (text for item in self.pictures for text in item.phrasing.variants(item.caption) or
                (item.phrasing.plain(item.caption), item.caption, item.phrasing.template or ""))

    def example(self, place: int, width: int, height: int) -> Example:
        """A picture to draw with, of that size, for bases that are shown one: held out, where any is."""
        items = self.held_out or self.pictures
        return example(items[place % len(items)], self.rule.extras, width, height)

    # --- what the user is told ---------------------------------------------------------------------------
    def describe(self) -> list[str]:
        """Every picture accounted for, in a few lines."""
        lines = accounts(self.data, self.pictures, self.class_pictures, self.held_out)
        trained = "as their encoder is trained"
        encoded = [f"{what} are encoded {'once' if once else f'in each step, {why}'}" for what, once, live, why in (
            ("pictures", self.rule.latents, self.rule.pixels, trained),
            ("captions", self.rule.text, self.rule.captions, "as they vary" if self.varied else trained))
            if once or live]
        length = self.epoch_steps
        holes = {one.inpaint_masks for one in self.data.sets if "mask" in self.rule.extras and one.inpaint == "random"}
        lines += [f"each picture is shown with {count} random hole{'s' * (count > 1)}; kept encoded"
                  for count in sorted(holes)]
        return [*lines, *self._wordings(), *self.notes, "; ".join(encoded),
                f"an epoch is {length} step{'s' if length > 1 else ''}"]

    def _wordings(self) -> list[str]:
        """What becomes of captions, set by set."""
        return [line for number in range(len(self.data.sets)) for line in wordings(of_set(self.pictures, number))]


# --- preparing ---------------------------------------------------------------------------------------------


def prepare_source(base: Base, data: DataOptions | DataSets, prior: PriorOptions | None, *, trains: frozenset[str],
                   batch_size: int, accumulation: int, seed: int, device: torch.device | str,
                   reads: frozenset[str] = READS, report: Reporter = SILENT, rank: int = 0, world: int = 1,
                   validation: ValidationOptions | None = None, pictures: Pictures | None = None) -> Source:
    """Look at every picture, draw class pictures where none are there, encode what may be encoded once.

    `trains` names the components that are trained, `reads` what the objective looks at. Without `validation` no
    picture is held out. `pictures`: what `pictures_of` has found before the base was there. Nothing may be attached to
    the base yet: class pictures are drawn with the base as it is. Raises `UserError` as `pictures_of` does.
    """
    share = Share(batch_size, accumulation, seed, rank, world)
    for number, one in enumerate(data.sets):
        check_sizes(one, base.grid, label(number, data))
    extras = wanted(base, data, reads, trains)
    fingerprint = base.fingerprint()
    found = pictures or pictures_of(data, prior, validation, seed, report)
    items, held_out, class_items = found.learned, found.held_out, found.of_class or ()
    if prior is not None and found.of_class is None:
        class_data = of_class_pictures(data.sets[0], prior)
        listing = draw_prior(base, fingerprint, prior, class_data.resolution, report, rank, world)
        class_items = collect(listing, class_data, report, "class pictures", prior.weight)
    many = any(one.wildcards for one in data.sets) and any(item.phrasing.variants(item.caption) is None
                                                           for item in itertools.chain(items, class_items))
    rule = frontier(trains, base.text_encoder_names, data, reads, many=many, extras=extras)
    cache = (Packs if isinstance(items, Many) else Cache).at(cache_folder(data))
    encoding = Encoding(base, fingerprint, cache, rule, torch.device(device))
    items, class_items, held_out = encoding.keyed(items), encoding.keyed(class_items), encoding.keyed_plain(held_out)
    no_caption = encoding.caption("") if any(one.caption_dropout + one.both_dropout for one in data.sets) \
        else ""
    encoding.run(report, rank, world)
    notes = unread(items, base.longest) if rule.text or rule.captions else []
    return Source(_kept(items), tuple(class_items), data, rule, share, cache, base.stack_text, no_caption,
                  LABEL_SIZES if any(one.source == "world" for one in data.sets) else (), notes=notes + found.notes,
                  varied=rule.captions and not set(base.text_encoder_names) & trains, held_out=_kept(held_out))


def _kept(items: Sequence[Item]) -> Sequence[Item]:
    return items if isinstance(items, Many) else tuple(items)
