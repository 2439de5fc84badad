"""The order of pictures: a pure function of (seed, epoch), and of nothing that happens.

The micro-batches of all epochs form one endless stream. Each holds `group` pictures of one bucket, and each
rank takes its slice of it. Optimizer step s takes micro-batches [s·A, (s + 1)·A) of the stream, A being the
accumulation; where A does not divide an epoch, a step reaches over into the next one. So nothing is
dropped, and where a step stands follows from its number alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from impasto.core.rng import permutation
from impasto.data.dataset import Size


@dataclass(frozen=True)
class Order:
    """The stream of micro-batches over pictures that lie in buckets."""

    buckets: tuple[tuple[Size, tuple[int, ...]], ...]  # each bucket's size and its pictures, both sorted
    group: int  # pictures in a micro-batch, over all ranks
    seed: int
    stream: str  # "pictures" or "class pictures": the two are drawn apart

    @classmethod
    def over(cls, sizes: Sequence[Size], group: int, seed: int, stream: str) -> Order:
        """The order over pictures 0, 1, …, whose buckets are `sizes`."""
        members: dict[Size, list[int]] = {}
        for i, size in enumerate(sizes):
            members.setdefault(size, []).append(i)
        return cls(tuple((size, tuple(members[size])) for size in sorted(members)), group, seed, stream)

    @property
    def epoch_length(self) -> int:
        """Micro-batches in an epoch."""
        return sum(-(-len(members) // self.group) for _, members in self.buckets)

    def micro_batch(self, index: int) -> Sequence[int]:
        """The `group` pictures of the stream's micro-batch `index`."""
        epoch, place = divmod(index, self.epoch_length)
        return epoch_order(self, epoch)[place]


@functools.lru_cache(maxsize=8)
def epoch_order(order: Order, epoch: int) -> list[list[int]]:
    """All micro-batches of an epoch.

    Each bucket in its own permutation; its last micro-batch is filled up from the start of that
    permutation, so one picture may stand there twice. Then the micro-batches of all buckets are shuffled.
    """
    batches: list[list[int]] = []
    for (height, width), members in order.buckets:
        turn = permutation(len(members), order.seed, order.stream, "epoch", epoch, height, width)
        for start in range(0, len(members), order.group):
            batches.append([members[turn[(start + i) % len(members)]] for i in range(order.group)])
    shuffled = permutation(len(batches), order.seed, order.stream, "batches", epoch)
    return [batches[i] for i in shuffled]
