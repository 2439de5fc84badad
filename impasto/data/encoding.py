"""Encoding before the run: what may be encoded once, gathered from all pictures and then done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impasto.core.progress import Reporter
from impasto.data import cache as caching
from impasto.data.augment import Variant
from impasto.data.beside import encode_extra, extra_key, load_extra, versions
from impasto.data.cache import Cache
from impasto.data.frontier import Frontier
from impasto.data.many import Many
from impasto.data.masks import Mask, cells
from impasto.data.phrasing import PLAIN, Phrasing
from impasto.families.base import Base, TextStates

if TYPE_CHECKING:
    from impasto.data.items import Item


@dataclass(frozen=True)
class Uses:
    """What may become of an item in a use: how its picture is shown, mirrored or not, and what is said of it."""

    shown: Callable[[Item], Sequence[tuple[Variant, bool]]]
    said: Callable[[Item], Sequence[str]]


def _shown(item: Item) -> list[tuple[Variant, bool]]:
    return [(item.variant(number), flip) for number in range(item.handling.augment.variants)
            for flip in item.handling.flips]


def _variants(uses: Uses, item: Item) -> list[Variant]:
    """How it may be shown, each once, not mirrored."""
    return [variant for variant, flip in uses.shown(item) if not flip]


def _cells(mask: Mask, variant: Variant, cell: int) -> dict[str, Tensor]:
    return {"mask": cells(mask, variant, cell)}


class Encoding:
    """What is to be encoded before the run, gathered from all pictures and then done."""

    def __init__(self, base: Base, fingerprint: dict[str, str], cache: Cache, rule: Frontier,
                 device: torch.device) -> None:
        self.base, self.cache, self.rule, self.device = base, cache, rule, device
        self.image_encoder = caching.image_encoder_key(base, fingerprint)
        self.text_encoder = caching.text_encoder_key(base, fingerprint)
        self.many: list[tuple[Many, Uses]] = []
        self.latents: dict[str, Callable[[], dict[str, Tensor]]] = {}
        self.texts: dict[str, Callable[[], TextStates]] = {}
        self.masks: dict[str, Callable[[], dict[str, Tensor]]] = {}
        self.extras: dict[str, Callable[[], dict[str, Tensor]]] = {}

    def keyed(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items with their cache keys, and what those keys stand for noted down."""
        return self._noted(items, Uses(_shown, lambda item: item.phrasing.variants(item.caption) or ()))

    def keyed_plain(self, items: Sequence[Item]) -> Sequence[Item]:
        """Likewise of held-out pictures: nothing about them is left to chance."""
        return self._noted(items, Uses(lambda item: [(Variant(item.placement), False)],
                                       lambda item: (item.phrasing.plain(item.caption),)))

    def _noted(self, items: Sequence[Item], uses: Uses) -> Sequence[Item]:
        if isinstance(items, Many) and items:
            items = items.keyed(functools.partial(self._with_keys, uses))
            self.many.append((items, uses))
            return items
        found = [self._with_keys(uses, item) for item in items]
        for item in found:
            for key, (variant, flip) in zip(item.latent_keys, uses.shown(item) if item.latent_keys else (),
                                            strict=True):
                self.latents[key] = functools.partial(caching.encode_picture, self.base, item.picture, variant, flip,
                                                      item.handling.background, device=self.device)
            for words in item.text_keys:
                self.caption(words, item.phrasing)
            for key, variant in zip(item.mask_keys, _variants(uses, item) if item.mask_keys else (), strict=True):
                assert item.mask is not None
                self.masks[key] = functools.partial(_cells, item.mask, variant, self.base.cell)
            for key, shown in self._beside(uses, item):
                self.extras[key] = functools.partial(self._encode_beside, item, *shown)
        return found

    def _with_keys(self, uses: Uses, item: Item) -> Item:
        latents = [caching.latent_key(item.picture, variant, flip, item.handling.background, self.image_encoder)
                   for variant, flip in (uses.shown(item) if self.rule.latents else ())]
        texts = uses.said(item) if self.rule.text else ()
        masks = [caching.mask_key(item.mask, variant, self.base.cell) for variant in _variants(uses, item)] \
            if item.mask is not None and not item.handling.hole_of_mask else ()
        return replace(item, latent_keys=tuple(latents), mask_keys=tuple(masks),
                       extra_keys=tuple(key for key, _ in self._beside(uses, item)),
                       text_keys={words: self._text_key(words, item.phrasing) for words in texts})

    def _beside(self, uses: Uses, item: Item) -> list[tuple[str, tuple[Variant, bool, int]]]:
        """What is shown beside an item: keys, and of what."""
        extras = self.rule.extras
        return [(extra_key(item, variant, flip, number, extras, self.image_encoder), (variant, flip, number))
                for variant, flip in (uses.shown(item) if extras else ()) for number in range(versions(item, extras))]

    def _encode_beside(self, item: Item, variant: Variant, flip: bool, number: int) -> dict[str, Tensor]:
        return encode_extra(self.base, load_extra(item, variant, flip, number, self.rule.extras), self.device,
                            (item.source or item.picture).path)

    def _text_key(self, words: str, phrasing: Phrasing) -> str:
        return caching.text_key(phrasing.encoded_as(words), self.text_encoder)

    def caption(self, words: str, phrasing: Phrasing = PLAIN) -> str:
        """The key of a caption's states, noted down; "" where the step encodes captions."""
        if not self.rule.text:
            return ""
        key = self._text_key(words, phrasing)
        self.texts[key] = functools.partial(caching.encode_caption, self.base, phrasing.encoded_as(words))
        return key

    def run(self, report: Reporter, rank: int, world: int) -> None:
        """Encode all of it that is not in the cache yet."""
        for items, uses in self.many:
            self._run_many(items, uses, report, rank, world)
        if self.latents:
            self.cache.fill(self.latents, "encoding pictures", "pictures", report, rank, world)
        if self.extras:
            what = "pictures to edit" if "picture" in self.rule.extras else "pictures with holes"
            self.cache.fill(self.extras, f"encoding {what}", "pictures", report, rank, world)
        if self.masks:
            self.cache.fill(self.masks, "cutting masks", "masks", report, rank, world)
        if self.texts:
            self.cache.fill(self.texts, "encoding captions", "captions", report, rank, world)

    def _run_many(self, items: Many, uses: Uses, report: Reporter, rank: int, world: int) -> None:
        """The same for items that are made when they are asked for."""
        from impasto.data.shards.cache import Making, Packs

        assert isinstance(self.cache, Packs), "such items have a cache of their own kind"

        def pictures(i: int) -> dict[str, Making]:
            item = items[i]

            def load(variant: Variant, flip: bool) -> Tensor:
                return variant.show(item.picture.read(item.handling.background), flip)

            def encode(pixels: Tensor) -> dict[str, Tensor]:
                return caching.encode_pixels(self.base, pixels, self.device, item.picture.name)

            return {key: Making(functools.partial(load, variant, flip), encode)
                    for key, (variant, flip) in zip(item.latent_keys, uses.shown(item), strict=True)}

        def beside(i: int) -> dict[str, Making]:
            item = items[i]
            return {key: Making(functools.partial(load_extra, item, *shown, self.rule.extras),
                                lambda loaded, item=item: encode_extra(self.base, loaded, self.device,
                                                                       item.picture.name))
                    for key, shown in self._beside(uses, item)}

        def captions(i: int) -> dict[str, Making]:
            item = items[i]
            return {key: Making(functools.partial(item.phrasing.encoded_as, words),
                                functools.partial(caching.encode_caption, self.base))
                    for words, key in item.text_keys.items()}

        one = items[0]
        facts = (items.facts, one.latent_keys, dict(one.text_keys), one.phrasing.facts,
                 one.handling.augment.facts, *([one.extra_keys] if one.extra_keys else []))
        for wanted, making, what in ((self.rule.latents, pictures, "pictures"),
                                     (bool(self.rule.extras), beside, "pictures with holes"),
                                     (self.rule.text, captions, "captions")):
            if wanted:
                self.cache.fill_many(len(items), making, caching.key_of(what, facts), f"encoding {what}", what, report,
                                     rank, world)
