"""Samples of shards as a run's items: each is made when it is asked for, from the shards' mapped indexes."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, overload

import numpy as np
from PIL import Image

from impasto.core.errors import UserError
from impasto.core.files import key_of
from impasto.core.progress import SILENT, Reporter
from impasto.core.rng import seed_for
from impasto.data.buckets import bucket_sizes, place
from impasto.data.dataset import Picture, decode
from impasto.data.heldout import how_many, told_of
from impasto.data.items import Handling, Item, unweighed
from impasto.data.many import Many, Tally
from impasto.data.options import DataOptions, ValidationOptions
from impasto.data.phrasing import Phrasing
from impasto.data.shards.access import Shard
from impasto.data.shards.order import ShardOrder
from impasto.data.shards.table import Survey, caption_of, open_table, refuse_samples, surveyed


@dataclass(frozen=True)
class ShardPicture(Picture):
    """A picture inside a shard. `path` is the shard's, for messages."""

    shard: Shard
    offset: int
    bytes: int

    def read(self, background: str = "white") -> Image.Image:
        """Fetch and decode it, and make sure that it is still what the index says. Raises `UserError`."""
        data = self.shard.read(self.offset, self.bytes)
        if hashlib.blake2b(data, digest_size=16).hexdigest() != self.digest:
            what = "is not whole any more: the shard has been cut short" if len(data) < self.bytes else \
                "has changed, or is damaged, since this command started"
            raise UserError(what, where=f"{self.shard.shown}, sample {self.name}",
                            fix="start it again: the shard is then read anew")
        return decode(data, background)


class ShardItems(Many):
    """Those of a survey's samples that have these numbers, ascending."""

    def __init__(self, survey: Survey, numbers: np.ndarray, weight: float = 1.0,
                 keying: Callable[[Item], Item] | None = None, *, weighed: bool = True) -> None:
        self.survey, self.numbers, self.weight, self.keying = survey, numbers, weight, keying
        self.weighed = weighed  # by their captions
        self.data = survey.data
        self._sizes = bucket_sizes(survey.data)
        self._phrasing, self._handling = Phrasing.of(survey.data), Handling.of(survey.data)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Item | Self:
        if isinstance(index, slice):
            return self._of(np.sort(self.numbers[index]))
        item = self._plain(int(self.numbers[index]))
        return item if self.keying is None else self.keying(item)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def _plain(self, number: int) -> Item:
        table = self.survey.table
        i, row = table.find(number)
        shard, index = table.shards[i], table.indexes[i]
        size = (int(index["height"][row]), int(index["width"][row]))
        placement = place(size, self.data, self._sizes)
        assert placement is not None, "what is too small is not used"
        picture = ShardPicture(Path(shard.shown), table.name(i, row), index["digest"][row].tobytes().hex(), size,
                               shard, int(index["offset"][row]), int(index["size"][row]))
        caption = caption_of(index, row, self.data)
        own = self.data.caption_weight(caption) if self.weighed else 1.0
        return Item(picture, caption, placement, self.weight * own, phrasing=self._phrasing, handling=self._handling,
                    own_weight=own)

    def _of(self, numbers: np.ndarray) -> Self:
        return type(self)(self.survey, numbers, self.weight, self.keying, weighed=self.weighed)

    # --- all of them at once -----------------------------------------------------------------------------
    def keyed(self, keying: Callable[[Item], Item]) -> Self:
        return type(self)(self.survey, self.numbers, self.weight, keying, weighed=self.weighed)

    def order(self, group: int, seed: int, stream: str) -> ShardOrder:
        edges = np.searchsorted(self.numbers, self.survey.table.starts)
        return ShardOrder(np.diff(edges).tolist(), self.survey.bucket[self.numbers], self.data.shuffle_window, group,
                          seed, stream)

    @property
    def facts(self) -> str:
        """Of all that is in the indexes but for the shards' places, which samples are used, and how they are cut."""
        hasher = hashlib.blake2b(digest_size=20)
        for index in self.survey.table.indexes:
            for name in ("digest", "height", "width", "status"):
                hasher.update(np.ascontiguousarray(index[name]).data)
            hasher.update(np.ascontiguousarray(index.text).data)
        data = self.data
        hasher.update(np.ascontiguousarray(self.numbers).data)
        hasher.update(self.survey.bucket.data)
        return key_of(hasher.hexdigest(), [len(index) for index in self.survey.table.indexes], self.survey.buckets,
                      data.upscale, data.caption, data.caption_source, data.wildcards, data.shuffle_window)

    def tally(self, buckets: Sequence[tuple[int, int]]) -> Tally:
        bucket = self.survey.bucket[self.numbers]
        cropped, scale = self.survey.cuts(self.numbers)
        counts = np.bincount(bucket, minlength=len(self.survey.buckets)).tolist()
        shapes = {size: count for size, count in zip(self.survey.buckets, counts, strict=True) if count}
        known = set(buckets)
        return Tally(len(self), shapes, float(cropped.mean()), self._most(cropped), int((scale > 1).sum()),
                     self._most(scale), sum(count for size, count in shapes.items() if size not in known),
                     len(self) - len(np.unique(self._digests())))

    def _most(self, values: np.ndarray) -> tuple[float, str]:
        place = int(values.argmax())
        return float(values[place]), self.survey.name(int(self.numbers[place]))

    def _digests(self) -> np.ndarray:
        """(N,) 16 opaque bytes each."""
        return np.ascontiguousarray(self.survey.table.column("digest", self.numbers)).view("V16").reshape(-1)

    def divided(self, own: Sequence[Item] | None, options: ValidationOptions,
                seed: int) -> tuple[Self, Sequence[Item], list[str]]:
        """As `heldout.divide`, with the same choice of the same contents."""
        digests = self._digests()
        if own is not None:
            chosen = {bytes.fromhex(item.picture.digest) for item in own if len(item.picture.digest) == 32}
        else:
            different = np.unique(digests)
            wanted = how_many(len(different), options.fraction)
            turn = ((seed_for(seed, "held out", digest.tobytes().hex()), digest.tobytes()) for digest in different) \
                if wanted else ()
            chosen = {digest for _, digest in heapq.nsmallest(wanted, turn)}
        out = np.isin(digests, np.array([np.void(digest) for digest in chosen], "V16")) if chosen else \
            np.zeros(len(digests), bool)
        kept, held_out = self._of(self.numbers[~out]), type(self)(self.survey, self.numbers[out], weighed=False)
        lines = told_of(len(kept), [held_out[i].picture.name for i in range(min(5, len(held_out)))], len(held_out),
                        own is not None)
        return kept, held_out if own is None else [unweighed(item) for item in own], lines


def shard_items(data: DataOptions, report: Reporter = SILENT, notes: list[str] | None = None) -> ShardItems:
    """All samples of `data.shards` that can be used. Raises one `UserError` with what cannot."""
    survey = surveyed(open_table(data, report), data)
    told = refuse_samples(survey)
    if notes is not None:
        notes += told
    return ShardItems(survey, survey.used, data.loss_weight)
