"""The replayed allocator against its rules, and against itself on a full card."""

from __future__ import annotations

import random

import pytest

from impasto.planning.allocator import ACCURACY, Full, least_room, replay

MIB = 2**20


@pytest.mark.parametrize(("size", "used", "taken"), [
    (1, 512, 2 * MIB), (MIB, MIB, 2 * MIB),  # small ones share segments of 2 MiB
    (MIB + 1, MIB + 512, 20 * MIB),  # larger ones those of 20 MiB
    (10 * MIB, 10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB, 12 * MIB),  # the largest have their own, whole ones of 2 MiB
])
def test_one_block(size: int, used: int, taken: int) -> None:
    assert replay([(1, size)]) == (used, taken)


def test_what_is_given_back_is_used_again() -> None:
    assert replay([(1, 30 * MIB), (1, 0), (2, 16 * MIB), (3, 14 * MIB)]) == (30 * MIB, 30 * MIB)


def test_free_neighbours_are_joined() -> None:
    events = [(1, 8 * MIB), (2, 12 * MIB), (1, 0), (2, 0), (3, 20 * MIB - 2 * MIB)]
    assert replay(events) == (20 * MIB, 20 * MIB)


def test_of_equal_pieces_the_one_of_the_lowest_address_is_taken() -> None:
    """A segment of 12 MiB, and half of one of 24: the first is used again, so that the second becomes whole."""
    first, whole, low, high, again, last = range(1, 7)
    events = [(first, 12 * MIB), (whole, 24 * MIB), (whole, 0), (low, 12 * MIB), (high, 12 * MIB),
              (low, 0), (first, 0), (again, 11 * MIB), (high, 0), (last, 24 * MIB)]
    assert replay(events) == (36 * MIB, 36 * MIB)


def test_a_full_card_gives_back_what_is_free() -> None:
    events = [(1, 30 * MIB), (1, 0), (2, 40 * MIB)]
    assert replay(events)[1] == 70 * MIB
    assert replay(events, 45 * MIB) == (40 * MIB, 40 * MIB)
    with pytest.raises(Full):
        replay(events, 39 * MIB)


def test_any_order_of_events_adds_up() -> None:
    """Whatever comes and goes: in use is at least what lives, and taken at least what is in use."""
    chance = random.Random(0)
    events, alive, most = list[tuple[int, int]](), dict[int, int](), 0
    for number in range(1, 3000):
        size = int(2 ** chance.uniform(4, 26))
        alive[number] = size
        events.append((number, size))
        most = max(most, sum(alive.values()))
        while alive and (sum(alive.values()) > 400 * MIB or chance.random() < 0.3):
            gone = chance.choice(list(alive))
            events.append((gone, 0))
            del alive[gone]
    used, taken = replay(events)
    assert most <= used <= taken
    least = least_room(events, most, taken)
    assert used <= least <= taken and replay(events, least)[1] <= least
    with pytest.raises(Full):
        replay(events, used - 1 if least - used < 2 * ACCURACY else least - 2 * ACCURACY)
