"""Rows of changes against the rows of their dense matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from impasto.core.errors import UserError
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.lowrank import LowRank
from impasto.deltas.rows import below, is_zero, taken

#: the kind, and whether it is cut in its own kind
MAKERS: dict[str, tuple[Callable[[tuple[int, ...]], Delta], bool]] = {
    "lora": (lambda shape: LowRank(shape, 3, 2.0), True),
    "loha": (lambda shape: Hadamard(shape, 2, 3.0), True),
    "lokr": (lambda shape: Kronecker(shape, 2, 3.0, factor=6), True),
    "lokr-both": (lambda shape: Kronecker(shape, 1, 3.0, factor=6, decompose_both=True), True),
    "lokr-uncut": (lambda shape: Kronecker(shape, 1, 3.0, factor=4), False),
    "lokr-whole": (lambda shape: Kronecker(shape, 99, factor=4, full=True), False),
    "dense": (lambda shape: Dense(shape, bias=True), True),
    "dora": (lambda shape: Dora(LowRank(shape, 3, 2.0), torch.ones(shape[0], 1)), True),
}
SHAPE = (36, 20)


def made(kind: str, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Delta:
    delta, draw = MAKERS[kind][0](shape), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return delta.requires_grad_(False)


def weight(delta: Delta, rows: list[int]) -> torch.Tensor:
    """dW on rows of a fixed W, in float64 from there on."""
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    return delta.weight(W[rows]).double()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("chosen, of", [([0], 3), ([2], 3), ([1, 0], 2), ([1], 2)])
def test_taken_rows_are_those_of_the_matrix(kind: str, chosen: list[int], of: int) -> None:
    delta, size = made(kind), SHAPE[0] // of
    rows = [row for part in chosen for row in range(part * size, (part + 1) * size)]
    part = taken(delta, chosen, of)
    assert close(weight(part, rows), weight(delta, [*range(SHAPE[0])])[rows])
    assert not MAKERS[kind][1] or part.kind == delta.kind
    if (bias := delta.bias()) is not None:
        assert torch.equal(part.bias(), bias[rows])


@pytest.mark.parametrize("kind", MAKERS)
def test_parts_below_one_another_are_the_whole(kind: str) -> None:
    """Of products at the same rank, with the same factors."""
    delta = made(kind)
    again = below([taken(delta, [part], 3) for part in range(3)])
    rows = [*range(SHAPE[0])]
    assert close(weight(again, rows), weight(delta, rows))
    if kind in ("lora", "loha", "lokr", "lokr-both"):
        one, other = again.tensors(), delta.tensors()
        assert again.kind == delta.kind
        assert all(torch.equal(one[name].double(), other[name].double()) for name in other)


@pytest.mark.parametrize("kinds", [["lora"] * 3, ["loha"] * 3, ["lokr"] * 3, ["dense"] * 3, ["lokr-whole"] * 3,
                                   ["lora", "loha", "dense"], ["lora", "lokr", "loha"], ["dora"] * 3,
                                   ["lora", "", "lora"], ["loha", "", "loha"], ["", "dense", ""], ["", "lokr", ""]])
def test_different_changes_below_one_another(kinds: list[str]) -> None:
    """And the parts come back out of it, those that change nothing as zeros."""
    shape = (SHAPE[0] // 3, SHAPE[1])
    parts: list[Delta | None] = []
    for seed, kind in enumerate(kinds):
        part = made(kind, seed, shape) if kind else None
        parts.append(part.scaled(1 + seed) if part is not None and part.linear else part)
    whole = below(parts)
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    for i, (part, rows) in enumerate(zip(parts, W.chunk(3), strict=True)):
        back = taken(whole, [i], 3)
        assert is_zero(back) == (part is None)
        if part is not None:
            assert close(whole.weight(W).chunk(3)[i].double(), part.weight(rows).double())
            assert close(back.weight(rows).double(), part.weight(rows).double())


def test_ranks_come_back_out_of_blocks() -> None:
    parts = [made("lora", seed, (8, 20)) for seed in range(3)]
    whole = below([*parts[:2], None])
    assert whole.tensors()["down"].shape[0] == 6
    for i in range(2):
        back = taken(whole, [i], 3).tensors()
        assert all(torch.equal(back[name].double(), parts[i].tensors()[name].double()) for name in ("up", "down"))
        assert float(back["alpha"]) == pytest.approx(2.0)


def test_what_cannot_be_cut_or_joined() -> None:
    lora = made("lora")
    by_input = Dora(made("lora"), torch.ones(1, SHAPE[1]))
    assert taken(by_input, [1, 0], 2).tensors()["magnitude"].shape == (1, SHAPE[1])
    for wrong in (lambda: taken(by_input, [0], 3), lambda: below([made("dora"), None]),
                  lambda: below([made("dora"), lora]), lambda: below([by_input, by_input]),
                  lambda: taken(lora, [0], 5), lambda: below([lora, made("lora", 0, (3, 20))])):
        with pytest.raises(UserError):
            wrong()


def test_zeros_stay_whole() -> None:
    delta = LowRank.from_factors(torch.zeros(6, 2), torch.ones(2, 5))
    assert is_zero(delta) and taken(delta, [0], 3).tensors()["down"].shape == (2, 5)
