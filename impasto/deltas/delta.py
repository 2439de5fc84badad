"""What a delta is: one layer's change dW, of whatever parametrisation."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.layers import apply_weight, check_layer, is_plain, shape_of, weight_of


class Delta(nn.Module, abc.ABC):
    """The change of one layer's linear map (out, in / groups, *kernel), in the orientation of `layers.weight_of`.

    A subclass gives `weight`, `scaled`, `tensors` and `from_tensors`; it overrides `forward` and `add_to` where
    there is a cheaper route than the dense matrix. Its trainable state is its parameters.
    """

    #: name in the registry, and of what files call such a term
    kind: ClassVar[str]
    #: False where dW depends on W, so that two of them cannot simply be added
    linear: ClassVar[bool] = True
    #: shape of dW
    shape: tuple[int, ...]

    @abc.abstractmethod
    def weight(self, W: Tensor | None = None) -> Tensor:
        """dW, dense, of `shape`, in fp32 or wider; differentiable. Only nonlinear kinds look at the layer's W."""

    @abc.abstractmethod
    def scaled(self, strength: float) -> Self:
        """strength · this. It shares the factors of this one."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Named factors and numbers that say all of dW, free of any file format."""

    @classmethod
    @abc.abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The delta that `tensors()` came from (up to what does not change dW)."""

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """dW · x for an input of `layer`, without the layer's bias; here by the dense matrix."""
        weight = self.weight(weight_of(layer))
        return apply_weight(x, weight.to(x.device, compute_dtype(x, layer)), layer)

    def add_to(self, out: Tensor, x: Tensor, layer: nn.Module, plain: Tensor) -> Tensor:
        """out + dW · x, in out's dtype, by the cheapest route. `out` itself is not changed.

        `plain` is the layer's own output for x, before any delta: (W · x + bias).
        """
        return out + self(x, layer).to(out.dtype)

    def instead(self, x: Tensor, layer: nn.Module) -> Tensor | None:
        """(W + dW) · x + bias where that costs less than dW · x beside the layer's own product, else None.

        Asked only where this is the one delta on a layer.
        """
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down), (out, r) and (r, in / groups, *kernel), with dW = up · down exactly, in fp32 or wider.

        None where this kind has no such factors.
        """
        return None

    def joined(self, other: Delta) -> Delta | None:
        """One delta that equals the sum of both, or None where they must stand side by side."""
        return None

    def bias(self) -> Tensor | None:
        """What is added to the layer's bias, (out,), in fp32 or wider; most kinds add nothing."""
        return None

    def check_fit(self, layer: nn.Module, path: str) -> None:
        """Raise a `UserError` if this cannot be put on a layer, or was made for another shape."""
        check_layer(layer, path)
        check_shape(self.shape, shape_of(layer), path)

    def snapshot(self) -> Self:
        """A frozen copy on the CPU."""
        return copy.deepcopy(self).requires_grad_(False).cpu().eval()


class Onto(Delta, abc.ABC):
    """A delta that makes its product and the sum with what is there in one go."""

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        return self.onto(x, layer, compute_dtype(x, layer), None)

    def add_to(self, out: Tensor, x: Tensor, layer: nn.Module, plain: Tensor) -> Tensor:
        return self.onto(x, layer, out.dtype, out)

    @abc.abstractmethod
    def onto(self, x: Tensor, layer: nn.Module, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """dW · x, computed in `dtype` by the cheapest route, on top of `out` where it is given."""


def check_shape(change: tuple[int, ...], weight: tuple[int, ...], path: str) -> None:
    """Raise a `UserError` if a change is not of the shape of what it changes."""
    if change != weight:
        raise UserError(f"the layer's weight is {weight}, the adapter's change is {change}", where=path,
                        fix="the adapter was made for another base")


def takes_sums(x: Tensor, layer: nn.Module) -> bool:
    """Whether W + dW may be made and multiplied with x instead of W: the layer is plain, frozen, and at least in fp32,
    so that the sum rounds no change away."""
    if not is_plain(layer):
        return False
    weight, bias = layer.weight, layer.bias
    if weight.requires_grad or bias is not None and bias.requires_grad:
        return False
    wide = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    return wide and x.device == weight.device and not torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor, layer: nn.Module) -> torch.dtype:
    """The dtype in which `layer` computes on x: its weight's for a lookup, else autocast's or the input's."""
    if isinstance(layer, nn.Embedding):
        return layer.weight.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is if it is wider: products of half precision factors round."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
