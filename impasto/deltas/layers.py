"""Which layers can carry a delta, and the linear map inside each of them.

A delta changes a linear map (out, in, *kernel). Linear and convolutional layers store it like that in
`weight`; an embedding (of one-hot vectors) and GPT-2's `Conv1D` store its transpose.

A layer may hold its weight in few bits, and make it whenever it is asked for: `quantised` names how, `shape` is known
without making it. Deltas stand beside such a layer as beside any other; nothing can be merged into it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.core.errors import UserError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: these have a weight (c,) that scales; a dense change of it, and of the bias, is all that they can carry
NORMS = (nn.GroupNorm, nn.LayerNorm)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`: a linear layer whose weight is (in, out). Told without importing it."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer's `weight` is the transpose of its linear map."""
    return isinstance(layer, nn.Embedding) or is_conv1d(layer)


def check_layer(layer: nn.Module, path: str) -> None:
    """Raise a `UserError` if a delta on this layer would not do what it says."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UserError("belongs to nn.MultiheadAttention, which reads its weight and never calls it: a change "
                        "there would have no effect", where=path, fix="leave it out")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise UserError("renormalises its rows (max_norm) at each use and cannot carry a delta", where=path,
                        fix="leave it out")
    if not isinstance(layer, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) and not is_conv1d(layer):
        raise UserError(f"is a {type(layer).__name__}, which cannot carry a delta", where=path,
                        fix="Linear, Conv1d, Conv2d, Conv3d and Embedding layers can")


def is_plain(layer: nn.Module) -> bool:
    """Whether what this layer computes is its weight times its input and its bias, in its input's dtype, and nothing
    else: a class of PyTorch's own, or one that says so of itself by `is_plain = True`."""
    return type(layer) in (nn.Linear, *CONVOLUTIONS) or getattr(type(layer), "is_plain", False) is True


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's linear map W, (out, in / groups, *kernel): a view of its weight, a copy only of one that is held in
    few bits."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed(layer) else weight


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of `weight_of`."""
    shape = layer.shape if held_in_few_bits(layer) else weight_of(layer).shape
    assert isinstance(shape, tuple)
    return tuple(shape)


def held_in_few_bits(layer: nn.Module) -> str:
    """How, if the layer's weight is; else ""."""
    return getattr(layer, "quantised", "")


def device_of(layer: nn.Module) -> torch.device | None:
    """Where what a layer holds is; None of one that holds nothing."""
    first = next(itertools.chain(layer.parameters(), layer.buffers()), None)
    return None if first is None else first.device


def apply_weight(x: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
    """weight · x, as `layer` would apply a weight (n, in / groups, *kernel), without its bias."""
    if isinstance(layer, CONVOLUTIONS):
        return layer._conv_forward(x, weight, None)  # knows stride, padding and its mode, dilation, groups
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight.T, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    return F.linear(x, weight)
