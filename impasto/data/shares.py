"""The order of pictures where each set has its share of the samples: a pure function of the place in it, as any order.

It has no epochs' ends, and nothing is filled up or dropped: which shape a micro-batch has, which set a sample of that
shape comes from, and which of that set's pictures comes next are three nested sequences without end. Each keeps to
its shares at any length, to within one; a set's pictures of a shape go round in one permutation after the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from impasto.core.rng import permutation, seed_for
from impasto.data.dataset import Size

#: length of the stretches of a mixture that are made at once
STRETCH = 64


@dataclass(frozen=True)
class Mixture:
    """An endless sequence of kinds 0, 1, …, of which each has its part.

    The i-th turn of a kind of part p falls at a time in [i/p, (i + 1)/p), drawn evenly (stratified), and turns come in
    the order of their times. So of the first n turns a kind has n·p, to within the number of kinds.
    """

    parts: tuple[float, ...]  # they sum up to 1
    key: tuple[int | str, ...]  # of the draws

    @classmethod
    def of(cls, weights: Sequence[float], *key: int | str) -> Mixture:
        """The mixture with parts in these proportions, none of them 0."""
        whole = math.fsum(weights)
        return cls(tuple(weight / whole for weight in weights), key)

    def at(self, index: int) -> tuple[int, int]:
        """The kind of turn `index`, and how many turns that kind has had before."""
        number = index // STRETCH
        while (start := _stretch(self, number)[0]) > index:
            number -= 1
        while start + len(_stretch(self, number)[1]) <= index:
            number += 1
            start = _stretch(self, number)[0]
        return _stretch(self, number)[1][index - start]

    def time(self, kind: int, turn: int) -> float:
        """When a kind's turn falls; a turn takes 1 on average over all kinds."""
        return (turn + seed_for(*self.key, kind, turn) / 2**63) / self.parts[kind]

    def before(self, kind: int, time: float) -> int:
        """How many turns of a kind fall before a time."""
        turns = max(0, int(time * self.parts[kind]) - 1)
        while self.time(kind, turns) < time:
            turns += 1
        return turns


@functools.lru_cache(maxsize=512)
def _stretch(mixture: Mixture, number: int) -> tuple[int, list[tuple[int, int]]]:
    """The turns of [number, number + 1) · `STRETCH`: how many come before, and each one's kind and number."""
    begin, end = float(number * STRETCH), float((number + 1) * STRETCH)
    turns: list[tuple[float, int, int]] = []
    earlier = 0
    for kind in range(len(mixture.parts)):
        first = mixture.before(kind, begin)
        earlier += first
        turns += [(mixture.time(kind, turn), kind, turn) for turn in range(first, mixture.before(kind, end))]
    return earlier, [(kind, turn) for _, kind, turn in sorted(turns)]


@dataclass(frozen=True)
class SharedOrder:
    """The stream of micro-batches over pictures of several sets, each with its share of the samples."""

    shapes: Mixture
    sets: tuple[Mixture, ...]  # for each shape
    members: tuple[tuple[tuple[int, ...], ...], ...]  # for each shape and set that has pictures of it
    group: int  # pictures in a micro-batch, over all ranks
    epoch_length: int  # micro-batches in which the set of the smallest share for its size is gone through once
    key: tuple[int | str, ...]

    @classmethod
    def over(cls, places: Sequence[tuple[Size, int]], shares: Sequence[float], group: int, seed: int,
             stream: str) -> SharedOrder:
        """The order over pictures 0, 1, …, of which `places` tells bucket and set; set s has part `shares[s]`."""
        counts = [sum(number == own for _, own in places) for number in range(len(shares))]
        cells: dict[Size, dict[int, list[int]]] = {}
        for i, (size, number) in enumerate(places):
            cells.setdefault(size, {}).setdefault(number, []).append(i)
        key = (seed, stream, "shares")
        weights = {size: [shares[number] / counts[number] * len(cells[size][number]) for number in sorted(cells[size])]
                   for size in sorted(cells)}
        longest = max(count / share for count, share in zip(counts, shares, strict=True)) * math.fsum(shares)
        return cls(Mixture.of([math.fsum(each) for each in weights.values()], *key, "shape"),
                   tuple(Mixture.of(each, *key, "set", *size) for size, each in weights.items()),
                   tuple(tuple(tuple(cells[size][number]) for number in sorted(cells[size])) for size in weights),
                   group, math.ceil(longest / group - 1e-9), key)

    def micro_batch(self, index: int) -> Sequence[int]:
        """The `group` pictures of the stream's micro-batch `index`, all of one shape."""
        shape, turn = self.shapes.at(index)
        return [self._picture(shape, turn * self.group + spot) for spot in range(self.group)]

    def _picture(self, shape: int, sample: int) -> int:
        """The picture of a shape's sample of that number."""
        which, turn = self.sets[shape].at(sample)
        members = self.members[shape][which]
        round_, place = divmod(turn, len(members))
        return members[_turn(len(members), (*self.key, shape, which, round_))[place]]


@functools.lru_cache(maxsize=1024)
def _turn(count: int, key: tuple[int | str, ...]) -> list[int]:
    """A permutation of so many pictures, kept while a round lasts."""
    return permutation(count, *key)
