"""A delta whose shape says the same as its layer's in other words: files hold 1×1 convolutions as matrices."""

from __future__ import annotations

from torch import Tensor, nn

from impasto.deltas.delta import Delta
from impasto.deltas.layers import shape_of


def fitted(delta: Delta, layer: nn.Module) -> Delta:
    """The delta with the layer's shape, where the two differ by a kernel of ones alone; else the delta itself.

    It shares the factors of the old one.
    """
    return shaped(delta, shape_of(layer)) if isinstance(getattr(layer, "weight", None), Tensor) else delta


def alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes of weights differ by a kernel of ones at most."""
    return one == other or len(one) >= 2 and len(other) >= 2 and one[:2] == other[:2] and {*one[2:], *other[2:]} <= {1}


def shaped(delta: Delta, shape: tuple[int, ...]) -> Delta:
    """The delta with that shape, where its own differs by a kernel of ones alone; else the delta itself."""
    if delta.shape == shape or not alike(delta.shape, shape):
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
