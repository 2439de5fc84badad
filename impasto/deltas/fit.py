"""A delta whose shape says the same as its layer's in other words: files hold 1×1 convolutions as matrices."""

from __future__ import annotations

from torch import Tensor, nn

from impasto.deltas.delta import Delta
from impasto.deltas.layers import shape_of


def fitted(delta: Delta, layer: nn.Module) -> Delta:
    """The delta with the layer's shape, where the two differ by a kernel of ones alone; else the delta itself.

    It shares the factors of the old one.
    """
    if not isinstance(getattr(layer, "weight", None), Tensor):
        return delta
    old, shape = delta.shape, shape_of(layer)
    pointwise = len(old) >= 2 and len(shape) >= 2 and old[:2] == shape[:2] and {*old[2:], *shape[2:]} <= {1}
    if old == shape or not pointwise:
        return delta
    ones = shape[2:]
    tensors = {}
    for name, tensor in delta.tensors().items():
        own = name.removeprefix("inner.")
        if own == "shape":
            tensor = tensor.new_tensor(shape)
        elif own in ("up", "down", "weight", "w2", "magnitude"):
            tensor = tensor.reshape(*tensor.shape[:2], *ones)
        elif own == "mid" or own.startswith("t") and len(own) == 2:
            return delta  # a core makes no sense without a kernel
        tensors[name] = tensor
    return type(delta).from_tensors(tensors)
