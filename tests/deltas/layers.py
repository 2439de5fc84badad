"""One layer of each kind that can carry a delta, with an input for it, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from impasto.deltas.lowrank import LowRank

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "linear without bias": lambda: nn.Linear(6, 5, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv2d 1x1": lambda: nn.Conv2d(4, 6, 1),
    "conv2d of odd geometry": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
    "conv2d that pads by itself": lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
    "conv2d in groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 6, 2, padding=1),
    "embedding": lambda: nn.Embedding(9, 5),
    "embedding with padding": lambda: nn.Embedding(9, 5, padding_idx=2),
    "gpt2": lambda: Conv1D(5, 6),
}


def make_layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind]().double().requires_grad_(False)


def make_input(layer: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[1, 2, 8], [2, 2, 0]])
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sides = [5, 4, 2][: layer.weight.ndim - 2]
        return torch.randn(2, layer.in_channels, *sides, generator=draw, dtype=torch.float64)
    return torch.randn(2, 3, 6, generator=draw, dtype=torch.float64)


def make_delta(shape: tuple[int, ...], rank: int = 3, alpha: float = 2.0, seed: int = 0, *, rslora: bool = False,
               dtype: torch.dtype = torch.float64) -> LowRank:
    """A delta whose both factors are random."""
    draw = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=draw, dtype=torch.float64)
    down = torch.randn(rank, *shape[1:], generator=draw, dtype=torch.float64)
    return LowRank.from_factors(up.to(dtype), down.to(dtype), alpha, rslora=rslora)


def dense_of(delta: LowRank) -> Tensor:
    """dW by the definition, summed rank by rank in float64: the slow, obvious reference."""
    scale = delta.alpha / (delta.rank**0.5 if delta.rslora else delta.rank)
    total = torch.zeros(delta.shape, dtype=torch.float64)
    for r in range(delta.rank):
        column = delta.up.detach().double()[:, r].reshape(-1, *(1 for _ in delta.shape[1:]))
        total += scale * column * delta.down.detach().double()[r]
    return total


def with_weight(layer: nn.Module, dW: Tensor) -> nn.Module:
    """A copy of the layer with dW added to its own weight."""
    changed = copy.deepcopy(layer)
    transposed = isinstance(layer, (nn.Embedding, Conv1D))
    changed.weight += dW.T if transposed else dW
    return changed
