"""A change of a whole weight, and of the bias beside it: in LyCORIS' files `diff`, `diff_b`, `w_norm`, `b_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.delta import Delta, at_least_fp32, check_shape, compute_dtype
from impasto.deltas.layers import NORMS, apply_weight, check_layer, shape_of


class Dense(Delta):
    """dW as it is, and a change of the bias (out,); either may be missing.

    It alone may also be on a norm: GroupNorm or LayerNorm over the last dimension, weight (c,) and bias (c,). `shape`
    is () where only the bias changes.
    """

    kind: ClassVar[str] = "dense"
    change: nn.Parameter | None
    change_of_bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], *, bias: bool = False) -> None:
        """A trainable one of zeros in fp32."""
        super().__init__()
        self._hold(torch.zeros(shape), torch.zeros(shape[0]) if bias else None, trains=True)

    def _hold(self, weight: Tensor | None, bias: Tensor | None, trains: bool) -> None:
        self.shape = () if weight is None else tuple(weight.shape)
        self.strength = 1.0
        for name, held in (("change", weight), ("change_of_bias", bias)):
            self.register_parameter(name, None if held is None else nn.Parameter(held.detach(), requires_grad=trains))

    @classmethod
    def from_weight(cls, weight: Tensor | None = None, bias: Tensor | None = None) -> Self:
        """Around given changes, which are kept as they are (dtype, device) and frozen."""
        if weight is None and bias is None:
            raise UserError("neither a change of the weight nor of the bias")
        if bias is not None and (bias.ndim != 1 or weight is not None and weight.shape[0] != bias.shape[0]):
            raise UserError(f"a change {tuple(bias.shape)} of the bias does not fit "
                            f"one {None if weight is None else tuple(weight.shape)} of the weight")
        delta = cls.__new__(cls)
        Delta.__init__(delta)
        delta._hold(weight, bias, trains=False)
        return delta

    def weight(self, W: Tensor | None = None) -> Tensor:
        """dW; where only the bias changes, zeros of W's shape, or one zero, which adds up with any."""
        if self.change is None:
            return torch.zeros(()) if W is None else torch.zeros_like(at_least_fp32(W))
        return at_least_fp32(self.change) * self.strength

    def bias(self) -> Tensor | None:
        return None if self.change_of_bias is None else at_least_fp32(self.change_of_bias) * self.strength

    def scaled(self, strength: float) -> Self:
        scaled = type(self).from_weight(self.change, self.change_of_bias)
        scaled.strength = self.strength * strength
        return scaled

    def tensors(self) -> dict[str, Tensor]:
        """weight and bias where there: as they were given at strength 1, else multiplied, in fp32 or wider."""
        held = {"weight": self.change, "bias": self.change_of_bias}
        return {name: change if self.strength == 1.0 else at_least_fp32(change) * self.strength
                for name, change in held.items() if change is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls.from_weight(tensors.get("weight"), tensors.get("bias"))

    def joined(self, other: Delta) -> Dense | None:
        """The sum of both, in fp32 or wider."""
        if not isinstance(other, Dense):
            return None
        weight = _sum(self.weight() if self.shape else None, other.weight() if other.shape else None)
        return Dense.from_weight(weight, _sum(self.bias(), other.bias()))

    def check_fit(self, layer: nn.Module, path: str) -> None:
        """Norms are allowed here; a bias must be of the layer's outputs."""
        if not isinstance(layer, NORMS) or getattr(layer, "weight", None) is None:
            check_layer(layer, path)
        weight = shape_of(layer)
        if self.shape:
            check_shape(self.shape, weight, path)
        if (bias := self.change_of_bias) is not None:
            if isinstance(layer, nn.Embedding):
                raise UserError("is an embedding, which has no bias", where=path,
                                fix="the adapter was made for another base")
            check_shape(tuple(bias.shape), weight[:1], path)

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """dW · x, without the change of the bias; of a norm, its normalised input times dW."""
        if self.change is None:  # zeros
            return (layer(x) * 0).detach()
        if isinstance(layer, NORMS):
            return _normalised(x, layer, self.weight().to(x), None)
        dtype = compute_dtype(x, layer)
        with torch.autocast(x.device.type, enabled=False):
            x = x if isinstance(layer, nn.Embedding) else x.to(dtype)
            return apply_weight(x, self.weight().to(x.device, dtype), layer)

    def add_to(self, out: Tensor, x: Tensor, layer: nn.Module, plain: Tensor) -> Tensor:
        """out + dW · x + the change of the bias."""
        bias = self.bias()
        if isinstance(layer, NORMS):
            zeros = torch.zeros_like(layer.weight)
            weight = (zeros if self.change is None else self.weight()).to(x)
            return out + _normalised(x, layer, weight, None if bias is None else bias.to(x)).to(out.dtype)
        if self.change is not None:
            out = out + self(x, layer).to(out.dtype)
        if bias is None:
            return out
        after = len(self.shape) - 2 if self.shape else len(shape_of(layer)) - 2  # dimensions behind the channels
        return out + bias.to(out).view(-1, *(1 for _ in range(after)))

    def extra_repr(self) -> str:
        return f"{self.shape}" + ("" if self.change_of_bias is None else ", bias")


def _normalised(x: Tensor, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    assert isinstance(layer, nn.LayerNorm)
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other.to(one)
