"""CUDA's caching allocator, replayed: what it takes from the card for storages that come and go.

It asks the card for segments and cuts blocks from them, the smallest that fits first, of equals the one of the lowest
address; what is given back is joined with free neighbours and kept (c10/cuda/CUDACachingAllocator.cpp, with its default
settings). On a full card it gives back segments that are free as a whole before it fails.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIB = 2**20

#: sizes of c10/core/AllocatorConfig.h: kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc,
#: kRoundLarge
BLOCK, SMALL, SMALL_SEGMENT, LARGE_SEGMENT, LARGE, ROUND = 512, MIB, 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


#: how closely the least room is told, bytes
ACCURACY = 16 * MIB


@dataclass(eq=False)
class Piece:
    """A part of a segment, between its neighbours there."""

    pool: Pool
    size: int
    address: int  # segments lie one after the other, in the order in which they were asked for
    before: Piece | None = None
    after: Piece | None = None

    def split(self, size: int) -> None:
        """Cut off what is beyond `size`, and leave it to the pool."""
        rest = Piece(self.pool, self.size - size, self.address + size, self, self.after)
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        self.pool.put(rest)

    def give_back(self) -> None:
        """To the pool, joined with neighbours that are there."""
        if self.before is not None and self.before in self.pool:
            first = self.before
            self.pool.remove(first)
            self.size, self.address, self.before = self.size + first.size, first.address, first.before
            if self.before is not None:
                self.before.after = self
        if self.after is not None and self.after in self.pool:
            second = self.after
            self.pool.remove(second)
            self.size, self.after = self.size + second.size, second.after
            if self.after is not None:
                self.after.before = self
        self.pool.put(self)


class Pool:
    """Free pieces of segments of one kind, sorted by size."""

    def __init__(self, least: int) -> None:
        self.least = least  # what is left over from a cut stays in the piece up to this size
        self._sorted: list[tuple[int, int]] = []
        self._pieces: dict[int, Piece] = {}

    def __contains__(self, piece: Piece) -> bool:
        return piece.address in self._pieces

    def put(self, piece: Piece) -> None:
        """Keep a free piece."""
        bisect.insort(self._sorted, (piece.size, piece.address))
        self._pieces[piece.address] = piece

    def remove(self, piece: Piece) -> None:
        """Take one out."""
        del self._sorted[bisect.bisect_left(self._sorted, (piece.size, piece.address))]
        del self._pieces[piece.address]

    def empty(self) -> int:
        """Give segments that are free as a whole back to the card; their bytes."""
        whole = [piece for piece in self._pieces.values() if piece.before is None and piece.after is None]
        for piece in whole:
            self.remove(piece)
        return sum(piece.size for piece in whole)

    def take(self, size: int) -> Piece | None:
        """The smallest piece that has that size."""
        place = bisect.bisect_left(self._sorted, (size, 0))
        return self._pieces.pop(self._sorted.pop(place)[1]) if place < len(self._sorted) else None


class Full(Exception):
    """The card has no room for a segment that is needed."""


def replay(events: Iterable[tuple[int, int]], room: float = math.inf) -> tuple[int, int]:
    """The most bytes that were in use, as `torch.cuda.max_memory_allocated` counts them, and that were taken from the
    card (`max_memory_reserved`), which has that much room; of events (number, bytes) of storages that come, and
    (number, 0) of those that go. Raises `Full`.
    """
    small, large = Pool(BLOCK - 1), Pool(SMALL)
    held: dict[int, Piece] = {}
    used = most_used = taken = most_taken = asked = 0
    for number, size in events:
        if not size:
            if (piece := held.pop(number, None)) is not None:
                used -= piece.size
                piece.give_back()
            continue
        wanted = -(-size // BLOCK) * BLOCK
        pool = small if wanted <= SMALL else large
        piece = pool.take(wanted)
        if piece is None:
            segment = SMALL_SEGMENT if pool is small else LARGE_SEGMENT if wanted < LARGE else \
                -(-wanted // ROUND) * ROUND
            if taken + segment > room:
                taken -= small.empty() + large.empty()
                if taken + segment > room:
                    raise Full
            taken += segment
            piece = Piece(pool, segment, asked)
            asked += segment
        if piece.size - wanted > pool.least:
            piece.split(wanted)
        held[number] = piece
        used += piece.size
        most_used, most_taken = max(most_used, used), max(most_taken, taken)
    return most_used, most_taken


def least_room(events: Sequence[tuple[int, int]], low: int, high: int) -> int:
    """The smallest room between two that does not work, or just does, and one that works; to `ACCURACY`, bytes."""
    while high - low > ACCURACY:
        middle = (low + high) // 2
        try:
            high = replay(events, middle)[1]
        except Full:
            low = middle
    return high
