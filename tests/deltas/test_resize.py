"""Spectra and lower ranks against full singular value decompositions in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted, chosen
from impasto.deltas.resize import overall, resized
from impasto.deltas.spectrum import of_matrix, of_product

LINEAR, CONVOLUTION = (24, 20), (12, 10, 3, 3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(shape: tuple[int, ...], rank: int, seed: int = 0) -> LowRank:
    return LowRank.from_factors(random(shape[0], rank, seed=seed), random(rank, *shape[1:], seed=seed + 1), 2.0)


def matrices(rows: int, columns: int) -> dict[str, Tensor]:
    """A few directions above noise, and a spectrum that falls as a power law."""
    least = min(rows, columns)
    left, right = (torch.linalg.qr(random(side, least, seed=side)).Q for side in (rows, columns))
    return {"planted": random(rows, 6) @ random(6, columns, seed=1) + random(rows, columns, seed=2),
            "flat": random(rows, columns), "power law": (left * torch.arange(1.0, least + 1).pow(-0.7)) @ right.T}


@pytest.mark.parametrize("shape", [(300, 400), (700, 300), (40, 30), (640, 2880)])
@pytest.mark.parametrize("kind", ["planted", "power law", "flat"])
def test_the_error_of_a_dense_matrix_is_told_and_nearly_the_least(shape: tuple[int, int], kind: str) -> None:
    matrix = matrices(*shape)[kind]
    rank = 10 if max(shape) < 1000 else 64
    spectrum = of_matrix(matrix, rank)
    up, down = spectrum.factors(rank)
    error = float((matrix - up @ down).double().norm() / matrix.double().norm())
    values = torch.linalg.svdvals(matrix.double())
    least = float((values[rank:].square().sum() / values.square().sum()).sqrt())
    assert least * (1 - 1e-6) <= error <= least * 1.005
    assert spectrum.error(rank) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (300, 280)])
def test_all_of_a_matrix(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    spectrum = of_matrix(matrix)
    torch.testing.assert_close(spectrum.values.double(), torch.linalg.svdvals(matrix.double()), rtol=1e-5, atol=1e-4)
    up, down = spectrum.factors(min(shape))
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-4)
    assert of_matrix(torch.zeros(shape)).error(0) == 0


def test_what_is_exact_is_told_as_exact() -> None:
    matrix = random(300, 8) @ random(8, 400, seed=1)
    assert of_matrix(matrix, 8).error(8) < 1e-5


def test_a_product_is_not_multiplied_out() -> None:
    up, down = random(50, 7), random(7, 60, seed=1)
    spectrum = of_product(up, down)
    torch.testing.assert_close(spectrum.values.double(), torch.linalg.svdvals(up.double() @ down.double())[:7],
                               rtol=1e-5, atol=0)
    again = spectrum.up * spectrum.values.float() @ spectrum.down
    torch.testing.assert_close(again, up @ down, rtol=1e-4, atol=1e-4)


ADAPTERS = {
    "lora": (lora(LINEAR, 8), lora(CONVOLUTION, 8)),
    "tucker": (lora(LINEAR, 8), LowRank.from_factors(random(12, 6), random(6, 10, 1, 1), 3.0, random(6, 6, 3, 3))),
    "dense": (Dense.from_weight(random(*LINEAR), random(24)), Dense.from_weight(random(*CONVOLUTION))),
    "two loras": (lora(LINEAR, 8), lora(CONVOLUTION, 8)),
}


def of(name: str) -> Adapter:
    one, other = ADAPTERS[name]
    adapter = Adapter({"unet.a": (one,), "unet.b": (other,)}, {"k": "v"}, "sd1")
    return adapter + Adapter({"unet.a": (lora(LINEAR, 3, 7),)}) if name == "two loras" else adapter


def made(kind: type, shape: tuple[int, ...], rank: int) -> Hadamard | Kronecker:
    delta = kind(shape, rank)
    with torch.no_grad():
        for i, parameter in enumerate(delta.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i))
    return delta.requires_grad_(False)


ADAPTERS["loha"] = (made(Hadamard, LINEAR, 3), made(Hadamard, CONVOLUTION, 5))
ADAPTERS["lokr"] = (made(Kronecker, LINEAR, 2), made(Kronecker, CONVOLUTION, 2))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_every_kind_comes_to_the_best_of_a_rank(name: str, rank: int) -> None:
    adapter = of(name)
    small, told = resized(adapter, Wanted(rank=rank))
    assert (small.metadata, small.family) == (adapter.metadata, adapter.family)
    for layer in adapter.layers:
        whole = adapter.dense(layer).flatten(1).double()
        left = float((small.dense(layer).flatten(1).double() - whole).norm() / whole.norm())
        values = torch.linalg.svdvals(whole)
        least = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        assert least - 1e-6 <= left <= least * 1.01 + 1e-5
        assert told[layer].error == pytest.approx(left, abs=1e-3)
        assert told[layer].norm == pytest.approx(float(whole.norm()), rel=1e-4)
    biases = [term.bias() for term in small.deltas["unet.a"] if term.bias() is not None]
    assert len(biases) == (name == "dense")
    errors = sum((told[layer].error * told[layer].norm) ** 2 for layer in told)
    assert overall(told) == pytest.approx((errors / sum(k.norm**2 for k in told.values())) ** 0.5)


def spectra(*layers: tuple[list[float], int, int]) -> dict:
    made = {}
    for i, (values, rows, columns) in enumerate(layers):
        matrix = torch.zeros(rows, columns)
        matrix[range(len(values)), range(len(values))] = torch.tensor(values)
        made[f"layer {i}"] = of_matrix(matrix)
    return made


def test_shares_are_kohyas() -> None:
    """networks/resize_lora.py: index_sv_fro, index_sv_cumulative, index_sv_ratio."""
    found = spectra(([4.0, 2.0, 1.0, 0.5], 6, 5))
    total = 16 + 4 + 1 + 0.25

    def rank(energy: float, measure: str) -> int:
        return chosen(found, Wanted(energy=energy, measure=measure))["layer 0"]  # type: ignore[arg-type]

    shares = (0.1, (16 / total) ** 0.5 + 1e-3, (20 / total) ** 0.5 - 1e-3, 0.999, 1)
    assert [rank(energy, "fro") for energy in shares] == [1, 2, 2, 4, 4]
    assert [rank(energy, "cumulative") for energy in (4 / 7.5, 4 / 7.5 + 1e-6, 1)] == [1, 2, 4]
    assert [rank(energy, "ratio") for energy in (1, 0.5, 0.25, 0.2, 0.1)] == [1, 2, 3, 3, 4]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_other_choice_of_as_many_numbers_leaves_less(data: st.DataObject) -> None:
    """Against every choice there is."""
    sizes = data.draw(st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), min_size=1, max_size=3))
    found = spectra(*(([data.draw(st.floats(0.1, 9)) for _ in range(min(size))], *size) for size in sizes))
    costs = {layer: sum(size) for layer, size in zip(found, sizes, strict=True)}
    numbers = data.draw(st.integers(sum(costs.values()), 60))
    ranks = chosen(found, Wanted(size=numbers, itemsize=1))

    def gain(ranks: dict[str, int]) -> float:
        return sum(float(found[layer].energies[:rank].sum()) for layer, rank in ranks.items())

    used = sum(costs[layer] * rank for layer, rank in ranks.items())
    assert used <= numbers and min(ranks.values()) >= 1
    if len({*costs.values()}) == 1:  # then the greedy choice is the best one
        every = itertools.product(*(range(1, len(found[layer].values) + 1) for layer in found))
        best = max(gain(dict(zip(found, choice, strict=True))) for choice in every
                   if sum(costs[layer] * rank for layer, rank in zip(found, choice, strict=True)) <= numbers)
        assert gain(ranks) == pytest.approx(best)


@pytest.mark.parametrize("wanted, line", [
    (dict(rank=30), "ranks are 8 at most, and 30 is asked for"), (dict(rank=0), "rank is 0"),
    (dict(), "asks for nothing"), (dict(rank=2, energy=0.5), "rank and energy"), (dict(energy=1.5), "energy is 1.5"),
    (dict(size=10), "rank 1 of every layer takes"), (dict(energy=0.5, measure="x"), "no measure"),
])
def test_what_cannot_be_is_one_line(wanted: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        resized(of("lora"), Wanted(**wanted))


def test_an_adapter_can_do_it_itself() -> None:
    small = of("lora").resize(rank=3)
    assert {term.factors()[0].shape[1] for terms in small.deltas.values() for term in terms} == {3}
    torch.testing.assert_close(of("lora").resize(energy=1.0).dense("unet.a"), of("lora").dense("unet.a"),
                               rtol=1e-4, atol=1e-4)
