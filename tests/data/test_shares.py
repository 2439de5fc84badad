"""Shares: each set has its part at any length, pictures go round, and the place in the stream is all it takes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.data.shares import Mixture, SharedOrder

SQUARE, WIDE, TALL = (64, 64), (64, 128), (128, 64)


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), seed=st.integers(0, 5), first=st.integers(0, 900))
def test_a_mixture_keeps_to_its_parts_at_any_length(weights: list[float], seed: int, first: int) -> None:
    """Of the first n turns a kind has n·p: the rest lies in what the other kinds are ahead or behind."""
    mixture = Mixture.of(weights, seed)
    counts = Counter[int]()
    for index in range(300):
        kind, before = mixture.at(index)
        assert before == counts[kind]  # turns of a kind are counted without a gap
        counts[kind] += 1
        for other, part in enumerate(mixture.parts):
            assert abs(counts[other] - (index + 1) * part) <= len(weights)
    fresh = Mixture.of(weights, seed)
    assert fresh.at(first) == mixture.at(first)  # wherever one begins
    assert math.isclose(sum(mixture.parts), 1)


def test_a_mixture_is_no_pattern() -> None:
    kinds = [Mixture.of([1, 1], "x").at(i)[0] for i in range(200)]
    assert kinds.count(0) in (99, 100, 101) and len({tuple(kinds[i:i + 4]) for i in range(0, 200, 4)}) > 3
    assert kinds != [Mixture.of([1, 1], "y").at(i)[0] for i in range(200)]


#: bucket and set of each picture: 12 of set 0 in three shapes, 3 of set 1 in two
PLACES = [(SQUARE, 0)] * 6 + [(WIDE, 0)] * 5 + [(TALL, 0)] + [(SQUARE, 1)] * 2 + [(WIDE, 1)]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.2, 0.8), (5, 1)])
def test_sets_have_their_shares_of_samples_and_their_pictures_come_alike(shares: tuple, group: int) -> None:
    order = SharedOrder.over(PLACES, shares, group, 0, "pictures")
    uses = Counter[int]()
    count = 1200
    for index in range(count):
        batch = order.micro_batch(index)
        assert len(batch) == group and len({PLACES[i][0] for i in batch}) == 1
        uses.update(batch)
    samples = count * group
    for number, share in enumerate(shares):
        own = [i for i, (_, other) in enumerate(PLACES) if other == number]
        part = share / sum(shares)
        found = sum(uses[i] for i in own)
        assert abs(found - samples * part) <= math.sqrt(samples * part * (1 - part))  # a standard deviation of chance
        assert abs(found - samples * part) <= 3 * group + 2 * len(shares)  # and a good deal less
        for i in own:
            assert abs(uses[i] - samples * part / len(own)) <= 3 * group + 2


def test_an_epoch_goes_through_the_set_that_comes_least() -> None:
    order = SharedOrder.over(PLACES, (1, 1), 1, 0, "pictures")
    assert order.epoch_length == 24  # 12 pictures of half of the samples
    assert SharedOrder.over(PLACES, (1, 1), 4, 0, "pictures").epoch_length == 6
    assert SharedOrder.over(PLACES, (4, 1), 1, 0, "pictures").epoch_length == 15


def test_the_order_is_a_function_of_place_and_seed() -> None:
    def stream(seed: int, name: str = "pictures") -> list:
        order = SharedOrder.over(PLACES, (1, 2), 3, seed, name)
        return [order.micro_batch(i) for i in (*range(100, 200), *range(100))]

    one = stream(0)
    assert stream(0)[100:] + stream(0)[:100] == one[100:] + one[:100]
    assert stream(1) != one and stream(0, "class pictures") != one
    later = SharedOrder.over(PLACES, (1, 2), 3, 0, "pictures")
    assert [later.micro_batch(i) for i in reversed(range(100, 200))][::-1] == one[:100]
    assert later.micro_batch(10**7) == later.micro_batch(10**7)  # as fast as any
