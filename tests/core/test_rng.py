"""Draws are functions of their key alone."""

from __future__ import annotations

import hashlib

import torch

from impasto.core.rng import Draws, generator, permutation, seed_for


def test_seed_is_the_documented_hash() -> None:
    expected = int.from_bytes(hashlib.blake2b(b"(0, 3, 'noise')", digest_size=8).digest(), "little") >> 1
    assert seed_for(0, 3, "noise") == expected


def test_a_row_depends_on_its_own_key_only() -> None:
    batch = Draws(1, 5, [0, 1, 2]).normal("noise", (4, 3))
    for row, sample in enumerate([0, 1, 2]):
        alone = torch.randn((4, 3), generator=generator(1, 5, sample, "noise"))
        assert torch.equal(batch[row], alone)
    assert torch.equal(Draws(1, 5, [2, 0]).normal("noise", (4, 3)), batch[[2, 0]])


def test_every_part_of_the_key_counts() -> None:
    def draw(seed: int, step: int, sample: int, use: str) -> tuple[float, ...]:
        return tuple(Draws(seed, step, [sample]).uniform(use, (4,))[0].tolist())

    keys = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_draws_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Draws(0, 0, [0]).normal("noise", (8,))
    permutation(10, 0, "epoch", 1)
    assert torch.equal(before, torch.get_rng_state())


def test_permutation_is_one() -> None:
    assert sorted(permutation(100, 0, "epoch", 1)) == list(range(100))
    assert permutation(100, 0, "epoch", 1) != permutation(100, 0, "epoch", 2)
