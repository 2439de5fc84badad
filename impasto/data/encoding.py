"""Encoding before the run: what may be encoded once, gathered from all pictures and then done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impasto.core.progress import Reporter
from impasto.data import cache as caching
from impasto.data.augment import Variant
from impasto.data.cache import Cache
from impasto.data.frontier import Frontier
from impasto.data.phrasing import PLAIN, Phrasing
from impasto.families.base import Base, TextStates

if TYPE_CHECKING:
    from impasto.data.items import Item


class Encoding:
    """What is to be encoded before the run, gathered from all pictures and then done."""

    def __init__(self, base: Base, fingerprint: dict[str, str], cache: Cache, rule: Frontier,
                 device: torch.device) -> None:
        self.base, self.cache, self.rule, self.device = base, cache, rule, device
        self.image_encoder = caching.image_encoder_key(base, fingerprint)
        self.text_encoder = caching.text_encoder_key(base, fingerprint)
        self.latents: dict[str, Callable[[], dict[str, Tensor]]] = {}
        self.texts: dict[str, Callable[[], TextStates]] = {}

    def keyed(self, items: Iterable[Item]) -> list[Item]:
        """The items with their cache keys, and what those keys stand for noted down."""
        return [replace(item, latent_keys=self._latent_keys(item, [
            (item.variant(number), flip) for number in range(item.handling.augment.variants)
            for flip in item.handling.flips]), text_keys=self._text_keys(item)) for item in items]

    def keyed_plain(self, items: Iterable[Item]) -> list[Item]:
        """Likewise of held-out pictures: nothing about them is left to chance."""
        def text(item: Item) -> dict[str, str]:
            words = item.phrasing.plain(item.caption)
            return {words: self.caption(words, item.phrasing)} if self.rule.text else {}

        return [replace(item, latent_keys=self._latent_keys(item, [(Variant(item.placement), False)]),
                        text_keys=text(item)) for item in items]

    def _latent_keys(self, item: Item, shown: Sequence[tuple[Variant, bool]]) -> tuple[str, ...]:
        keys = []
        for variant, flip in shown if self.rule.latents else ():
            cut_as = (item.picture, variant, flip, item.handling.background)
            keys.append(caching.latent_key(*cut_as, self.image_encoder))
            self.latents[keys[-1]] = functools.partial(caching.encode_picture, self.base, *cut_as,
                                                       device=self.device)
        return tuple(keys)

    def _text_keys(self, item: Item) -> dict[str, str]:
        """The key of each caption that the item may have; none where the step encodes them."""
        if not self.rule.text:
            return {}
        return {words: self.caption(words, item.phrasing) for words in item.phrasing.variants(item.caption) or ()}

    def caption(self, words: str, phrasing: Phrasing = PLAIN) -> str:
        """The key of a caption's states, noted down; "" where the step encodes captions."""
        if not self.rule.text:
            return ""
        caption = phrasing.encoded_as(words)
        key = caching.text_key(caption, self.text_encoder)
        self.texts[key] = functools.partial(caching.encode_caption, self.base, caption)
        return key

    def run(self, report: Reporter, rank: int, world: int) -> None:
        """Encode all of it that is not in the cache yet."""
        if self.latents:
            self.cache.fill(self.latents, "encoding pictures", "pictures", report, rank, world)
        if self.texts:
            self.cache.fill(self.texts, "encoding captions", "captions", report, rank, world)
