"""Encoding before the run: what may be encoded once, gathered from all pictures and then done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impasto.core.progress import Reporter
from impasto.data import cache as caching
from impasto.data.buckets import cut
from impasto.data.cache import Cache
from impasto.data.frontier import Frontier
from impasto.data.many import Many
from impasto.data.options import DataOptions
from impasto.data.phrasing import PLAIN, Phrasing
from impasto.families.base import Base, TextStates

if TYPE_CHECKING:
    from impasto.data.source import Item


class Encoding:
    """What is to be encoded before the run, gathered from all pictures and then done."""

    def __init__(self, base: Base, fingerprint: dict[str, str], cache: Cache, data: DataOptions,
                 rule: Frontier, device: torch.device) -> None:
        self.base, self.cache, self.data, self.rule, self.device = base, cache, data, rule, device
        self.image_encoder = caching.image_encoder_key(base, fingerprint)
        self.text_encoder = caching.text_encoder_key(base, fingerprint)
        self.many: list[Many] = []
        self.latents: dict[str, Callable[[], dict[str, Tensor]]] = {}
        self.texts: dict[str, Callable[[], TextStates]] = {}

    def keyed(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items with their cache keys, and what those keys stand for noted down."""
        return self._noted(items, self._with_keys)

    def keyed_plain(self, items: Sequence[Item]) -> Sequence[Item]:
        """Likewise of held-out pictures: nothing about them is left to chance."""
        return self._noted(items, self._with_plain_keys)

    def _noted(self, items: Sequence[Item], keying: Callable[[Item], Item]) -> Sequence[Item]:
        if isinstance(items, Many) and items:
            self.many.append(items.keyed(keying))
            return self.many[-1]
        found = [keying(item) for item in items]
        for item in found:
            for key, flip in zip(item.latent_keys, self.rule.flips, strict=False):
                self.latents[key] = functools.partial(caching.encode_picture, self.base, item.picture, item.placement,
                                                      flip, self.data.background, device=self.device)
            for words in item.text_keys:
                self.caption(words, item.phrasing)
        return found

    def _with_keys(self, item: Item) -> Item:
        texts = item.phrasing.variants(item.caption) or () if self.rule.text else ()
        return replace(item, latent_keys=self._latent_keys(item, self.rule.flips),
                       text_keys={words: self._text_key(words, item.phrasing) for words in texts})

    def _with_plain_keys(self, item: Item) -> Item:
        texts = (item.phrasing.plain(item.caption),) if self.rule.text else ()
        return replace(item, latent_keys=self._latent_keys(item, (False,)),
                       text_keys={words: self._text_key(words, item.phrasing) for words in texts})

    def _latent_keys(self, item: Item, flips: tuple[bool, ...]) -> tuple[str, ...]:
        return tuple(caching.latent_key(item.picture, item.placement, flip, self.data.background, self.image_encoder)
                     for flip in flips) if self.rule.latents else ()

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
        for items in self.many:
            self._run_many(items, report, rank, world)
        if self.latents:
            self.cache.fill(self.latents, "encoding pictures", "pictures", report, rank, world)
        if self.texts:
            self.cache.fill(self.texts, "encoding captions", "captions", report, rank, world)

    def _run_many(self, items: Many, report: Reporter, rank: int, world: int) -> None:
        """The same for items that are made when they are asked for."""
        from impasto.data.shards_cache import Making, Packs

        assert isinstance(self.cache, Packs), "such items have a cache of their own kind"

        def pictures(i: int) -> dict[str, Making]:
            item = items[i]

            def load(flip: bool) -> Tensor:
                return cut(item.picture.read(self.data.background), item.placement, flip)

            def encode(pixels: Tensor) -> dict[str, Tensor]:
                return caching.encode_pixels(self.base, pixels, self.device, item.picture.name)

            return {key: Making(functools.partial(load, flip), encode)
                    for key, flip in zip(item.latent_keys, self.rule.flips, strict=False)}

        def captions(i: int) -> dict[str, Making]:
            item = items[i]
            return {key: Making(functools.partial(item.phrasing.encoded_as, words),
                                functools.partial(caching.encode_caption, self.base))
                    for words, key in item.text_keys.items()}

        facts = items.facts, items[0].latent_keys, dict(items[0].text_keys), Phrasing.of(self.data).facts
        for wanted, making, what in ((self.rule.latents, pictures, "pictures"), (self.rule.text, captions, "captions")):
            if wanted:
                self.cache.fill_many(len(items), making, caching.key_of(what, facts), f"encoding {what}", what, report,
                                     rank, world)
