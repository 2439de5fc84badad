"""The algebra as laws, of adapters drawn at random, in fp64: there and back, scales, sums, and the best of a rank."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted
from impasto.deltas.resize import resized

SHAPES = {"unet.a": (12, 8), "unet.b": (8, 6, 3, 3), "unet.c": (6, 9)}
KINDS = ("lora", "loha", "lokr", "dense")
LAWS = settings(max_examples=60, deadline=None)


def drawn(kind: str, shape: tuple[int, ...], rank: int, seed: int) -> Delta:
    made: Delta = {"lora": lambda: LowRank(shape, rank, 1.5), "loha": lambda: Hadamard(shape, rank, 1.5),
                   "lokr": lambda: Kronecker(shape, rank, 1.5), "dense": lambda: Dense(shape)}[kind]()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return made.requires_grad_(False)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    layers = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
    return Adapter({layer: (drawn(draw(st.sampled_from(KINDS)), SHAPES[layer], draw(st.integers(1, 4)),
                                  draw(st.integers(0, 999))),) for layer in sorted(layers)})


def dense(adapter: Adapter, layer: str) -> Tensor:
    return adapter.dense(layer).double() if layer in adapter.deltas else torch.zeros(SHAPES[layer], dtype=torch.float64)


def same(one: Adapter, other: Adapter) -> None:
    for layer in SHAPES:
        size = float(max(dense(one, layer).abs().max(), dense(other, layer).abs().max(), torch.tensor(1.0)))
        assert float((dense(one, layer) - dense(other, layer)).abs().max()) <= 1e-12 * size


@LAWS
@given(adapters(), adapters())
def test_what_is_added_can_be_taken_away(a: Adapter, b: Adapter) -> None:
    same(a + b + -1.0 * b, a)
    same(a + b, b + a)


@LAWS
@given(adapters(), adapters(), st.floats(-2, 2), st.floats(-2, 2))
def test_strengths_distribute(a: Adapter, b: Adapter, s: float, t: float) -> None:
    same(s * (a + b), s * a + s * b)
    same((s * a) * t, a * (s * t))
    same(s * a + t * a, (s + t) * a)


@LAWS
@given(adapters(), adapters(), st.integers(1, 4))
def test_resizing_reaches_the_least_error_and_none_is_less(a: Adapter, b: Adapter, rank: int) -> None:
    """Eckart & Young 1936."""
    total = a + b
    small, told = resized(total, Wanted(energy=1.0, most=rank))
    for layer in total.layers:
        whole = dense(total, layer).flatten(1)
        values = torch.linalg.svdvals(whole)
        least = float(values[rank:].square().sum().sqrt())
        left = float((dense(small, layer).flatten(1) - whole).norm())
        assert least * (1 - 1e-9) - 1e-9 <= left <= least * 1.01 + 1e-6 * float(whole.norm())
        assert told[layer].rank <= rank


@LAWS
@given(adapters())
def test_low_rank_kinds_are_their_own_factors(a: Adapter) -> None:
    """A LoHa of rank r is a LoRA of rank r², a LoKr with a product in it one too: there and back to the same matrix."""
    for layer, (term,) in a.deltas.items():
        if (factors := term.factors()) is not None:
            lora = LowRank.from_factors(*factors)
            same(Adapter({layer: (lora,)}), Adapter({layer: (term,)}))
