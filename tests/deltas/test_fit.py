"""Deltas that hold a 1×1 convolution as a matrix, or the other way round, and what people are told of a delta."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from impasto.core.errors import UserError
from impasto.deltas.attach import attach
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.fit import fitted
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.lowrank import LowRank
from impasto.deltas.told import alpha_of, kinds_of, rank_of


def flat(kind: str) -> Delta:
    torch.manual_seed(0)
    low = LowRank.from_factors(torch.randn(8, 2), torch.randn(2, 6), 3.0)
    return {
        "lora": low, "dora": Dora(low, torch.rand(8, 1)), "dora-in": Dora(low, torch.rand(1, 6)),
        "loha": Hadamard.from_factors((8, 6), *(torch.randn(size) for size in ((8, 2), (2, 6)) * 2), 3.0),
        "lokr": Kronecker.from_factors((8, 6), w1=torch.randn(2, 2), w2=torch.randn(4, 3)),
        "lokr-low": Kronecker.from_factors((8, 6), w1=torch.randn(2, 2), w2_a=torch.randn(4, 1), w2_b=torch.randn(1, 3),
                                           alpha=3.0),
        "dense": Dense.from_weight(torch.randn(8, 6), torch.randn(8)),
    }[kind]


KINDS = ["lora", "dora", "dora-in", "loha", "lokr", "lokr-low", "dense"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_on_a_pointwise_convolution(kind: str) -> None:
    """The same outputs as on the linear layer of the same weight; and back again."""
    delta, layer, convolution = flat(kind), nn.Linear(6, 8), nn.Conv2d(6, 8, 1)
    with torch.no_grad():
        convolution.weight.copy_(layer.weight[:, :, None, None])
        convolution.bias.copy_(layer.bias)
    x = torch.randn(3, 6)
    with torch.no_grad(), attach(layer, {"": delta}), attach(convolution, {"": delta}):
        torch.testing.assert_close(convolution(x[:, :, None, None])[:, :, 0, 0], layer(x))
    wide = fitted(delta, convolution)
    assert wide.shape == (8, 6, 1, 1) and (kind == "dense" or wide.bias() is delta.bias() is None)
    W = layer.weight.detach()
    torch.testing.assert_close(fitted(wide, layer).weight(W), delta.weight(W))


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Conv2d(2, 8, (1, 3)), nn.Conv2d(6, 8, 3), nn.LayerNorm(8)])
def test_other_shapes_stay_and_are_refused(layer: nn.Module) -> None:
    delta = flat("lora")
    assert fitted(delta, layer) is delta
    with pytest.raises(UserError):
        attach(layer, {"": delta})


def test_what_fits_is_the_same_delta() -> None:
    """One whose parameters train has to be trained in place."""
    delta = flat("lora")
    assert fitted(delta, nn.Linear(6, 8)) is delta


@pytest.mark.parametrize(("kind", "kinds", "rank", "alpha"), [
    ("lora", ("lora",), 2, 3.0), ("dora", ("lora", "dora"), 2, 3.0), ("loha", ("loha",), 2, 3.0),
    ("lokr", ("lokr",), None, None), ("lokr-low", ("lokr",), 1, 3.0), ("dense", ("dense",), None, None),
])
def test_what_people_are_told(kind: str, kinds: tuple[str, ...], rank: int | None, alpha: float | None) -> None:
    assert (kinds_of(flat(kind)), rank_of(flat(kind)), alpha_of(flat(kind))) == (kinds, rank, alpha)
