"""A delta of every kind in the registry and every way that it can be built, random and in float64, with its dW by the
definition: the slow, obvious reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.layers import shape_of, weight_of
from impasto.deltas.lowrank import LowRank

#: each on a layer; those with a Tucker core on layers with a kernel only, see `suits`
CASES: dict[str, Callable[[nn.Module], Delta]] = {
    "lora": lambda layer: LowRank(shape_of(layer), 3, 2.0),
    "lora, tucker": lambda layer: LowRank(shape_of(layer), 3, 2.0, tucker=True),
    "loha": lambda layer: Hadamard(shape_of(layer), 2, 3.0),
    "loha, tucker": lambda layer: Hadamard(shape_of(layer), 2, 3.0, tucker=True),
    "lokr, full": lambda layer: Kronecker(shape_of(layer), 1, 3.0, full=True),
    "lokr": lambda layer: Kronecker(shape_of(layer), 1, 3.0, factor=1),
    "lokr, both": lambda layer: Kronecker(shape_of(layer), 1, 3.0, decompose_both=True),
    "lokr, first alone": lambda layer: _first_alone(shape_of(layer)),
    "lokr, tucker": lambda layer: Kronecker(shape_of(layer), 1, 3.0, factor=1, tucker=True),
    "dense": lambda layer: Dense(shape_of(layer)),
    "dora": lambda layer: Dora.of(LowRank(shape_of(layer), 3, 2.0), weight_of(layer)),
    "dora by input": lambda layer: Dora.of(LowRank(shape_of(layer), 3, 2.0), weight_of(layer), "in"),
    "dora of a loha": lambda layer: Dora.of(Hadamard(shape_of(layer), 2, 3.0), weight_of(layer)),
    "dora of a lokr by input": lambda layer: Dora.of(Kronecker(shape_of(layer), 1, full=True), weight_of(layer), "in"),
}


def _first_alone(shape: tuple[int, ...]) -> Kronecker:
    """Only w1 is a product: files hold such layers."""
    whole = Kronecker(shape, 1, full=True)
    one, two = whole.w1, whole.w2
    assert one is not None and two is not None
    return Kronecker.from_factors(shape, w1_a=torch.zeros(one.shape[0], 2), w1_b=torch.zeros(2, one.shape[1]), w2=two,
                                  alpha=3.0)


def make(case: str, layer: nn.Module, seed: int = 0) -> Delta:
    """The case on a layer, all its factors drawn, frozen."""
    delta = CASES[case](layer).double().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in delta.named_parameters():
        drawn = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.copy_(drawn.abs() + 0.3 if name == "magnitude" else drawn)
    return delta


def suits(case: str, layer: nn.Module) -> bool:
    return "tucker" not in case or len(shape_of(layer)) > 2


def definition(delta: Delta, W: Tensor) -> Tensor:
    """dW element by element from what the literature writes."""
    f = {name: tensor.double().clone() for name, tensor in delta.tensors().items()}
    shape = delta.shape
    if isinstance(delta, Dora):
        changed = W + definition(delta.inner, W)
        axes = [a for a in range(W.ndim) if delta.magnitude.shape[a] != W.shape[a] or a > 1]
        return f["magnitude"] * changed / changed.square().sum(axes, keepdim=True).sqrt() - W
    if isinstance(delta, Dense):
        return f["weight"]
    if isinstance(delta, LowRank):
        up, down = f["up"].flatten(1), f["down"].flatten(1)
        if "mid" in f:
            return f["alpha"] / 3 * torch.einsum("mn...,om,ni->oi...", f["mid"], up, down)
        return f["alpha"] / 3 * (up @ down).view(shape)
    if isinstance(delta, Hadamard):
        return f["alpha"] / 2 * _half(f, "1", shape) * _half(f, "2", shape)
    one = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    if "w2" in f:
        two = f["w2"]
    elif "t2" in f:
        two = torch.einsum("ij...,jn,im->mn...", f["t2"], f["w2_b"], f["w2_a"])
    else:
        two = (f["w2_a"] @ f["w2_b"]).view(f["w2_a"].shape[0], -1, *shape[2:])
    scale = f["alpha"] / (f["w2_b"] if "w2_b" in f else f["w1_b"]).shape[0] if len(f) > 4 else 1.0
    total = torch.empty(shape, dtype=torch.float64)
    for a in range(one.shape[0]):
        for b in range(one.shape[1]):
            rows = slice(a * two.shape[0], (a + 1) * two.shape[0])
            total[rows, b * two.shape[1]:(b + 1) * two.shape[1]] = scale * one[a, b] * two
    return total


def _half(f: dict[str, Tensor], half: str, shape: tuple[int, ...]) -> Tensor:
    a, b = f[f"w{half}_a"], f[f"w{half}_b"]
    if f"t{half}" not in f:
        return (a @ b).view(shape)
    return torch.einsum("ij...,jn,im->mn...", f[f"t{half}"], b, a)


def rank_of(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.reshape(matrix.shape[0], math.prod(matrix.shape[1:]))))
