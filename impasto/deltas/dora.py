"""DoRA: a weight's direction and its magnitude trained apart (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas import DELTAS
from impasto.deltas.delta import Delta, at_least_fp32, compute_dtype
from impasto.deltas.layers import CONVOLUTIONS, apply_weight, weight_of
from impasto.deltas.lowrank import LowRank


class Dora(Delta):
    """W' = magnitude · (W + dW) / ‖W + dW‖, with dW an inner delta of any linear kind; equation 5 of the paper.

    magnitude is (out, 1, …) with a norm for each output (peft, LyCORIS, ComfyUI) or (1, in, 1, …) with one for each
    input (the paper's figure, LyCORIS' wd_on_out = false). The norm is a constant in the backward pass (section 4.3;
    peft). Its own dW, W' − W, depends on W.
    """

    kind: ClassVar[str] = "dora"
    linear: ClassVar[bool] = False

    def __init__(self, inner: Delta, magnitude: Tensor) -> None:
        """Both are kept as they are; the magnitude trains if the inner delta does."""
        super().__init__()
        shape, ones = inner.shape, (1,) * (len(inner.shape) - 2)
        if not inner.linear or len(shape) < 2 or inner.bias() is not None:
            raise UserError(f"a {inner.kind} delta of shape {shape} has no magnitude to train apart")
        if tuple(magnitude.shape) not in ((shape[0], 1, *ones), (1, shape[1], *ones)):
            raise UserError(f"a magnitude {tuple(magnitude.shape)} does not fit a change of {shape}")
        self.inner, self.shape, self.strength = inner, shape, 1.0
        trains = any(parameter.requires_grad for parameter in inner.parameters())
        self.magnitude = nn.Parameter(magnitude.detach(), requires_grad=trains)

    @classmethod
    def of(cls, inner: Delta, W: Tensor, axis: Literal["out", "in"] = "out") -> Self:
        """The one whose magnitude is that of W + dW, in fp32 or wider: it changes W by dW alone."""
        ones = (1,) * (len(inner.shape) - 2)
        size = (inner.shape[0], 1, *ones) if axis == "out" else (1, inner.shape[1], *ones)
        delta = cls(inner, torch.ones(size, device=W.device))
        with torch.no_grad():
            delta.magnitude.data = delta._norm(W)
        return delta

    @property
    def by_output(self) -> bool:
        """Whether each output has a magnitude, not each input."""
        return self.magnitude.shape[0] == self.shape[0] and self.magnitude.shape[1] == 1

    @torch.no_grad()
    def _norm(self, W: Tensor) -> Tensor:
        """‖W + dW‖ along the magnitude's axis, of the magnitude's shape, in fp32 or wider.

        Of low-rank factors ‖W‖² + 2⟨W, dW⟩ + ‖dW‖², which needs no dense dW.
        """
        W = at_least_fp32(W)
        axes = [axis for axis in range(W.ndim) if axis != (0 if self.by_output else 1)]
        if not isinstance(self.inner, LowRank) or W.ndim > 2 and not self.by_output:
            return torch.linalg.vector_norm(W + self.inner.weight().to(W), dim=axes, keepdim=True)
        up, down = (factor.to(W.device, torch.promote_types(factor.dtype, W.dtype)) for factor in self.inner.factors())
        W, down = W.flatten(1).to(down), down.flatten(1)
        if not self.by_output:
            W, up, down = W.T, down.T, up.T
        crossed = (W @ down.T * up).sum(1)
        square = (up @ (down @ down.T) * up).sum(1)
        norm = (torch.linalg.vector_norm(W, dim=1).square() + 2 * crossed + square).clamp(min=0).sqrt()
        return norm.view(self.magnitude.shape)

    def _gain(self, W: Tensor) -> Tensor:
        """magnitude / ‖W + dW‖, of the magnitude's shape, in fp32 or wider."""
        norm = self._norm(W)
        return at_least_fp32(self.magnitude).to(norm) / norm.clamp(min=torch.finfo(norm.dtype).tiny)

    def weight(self, W: Tensor | None = None) -> Tensor:
        """strength · (W' − W)."""
        if W is None:
            raise UserError("a DoRA's change depends on the base's weight", fix="give the base")
        wide, gain = at_least_fp32(W), self._gain(W)
        return self.strength * (gain * self.inner.weight().to(wide) + (gain - 1) * wide)

    def scaled(self, strength: float) -> Self:
        """strength · (W' − W)."""
        scaled = copy.copy(self)
        scaled.strength = self.strength * strength
        return scaled

    def tensors(self) -> dict[str, Tensor]:
        """The inner's as "inner.…", magnitude, strength (fp64), and the inner's kind as bytes of its name."""
        return {**{f"inner.{name}": tensor for name, tensor in self.inner.tensors().items()},
                "magnitude": self.magnitude, "strength": torch.tensor(self.strength, dtype=torch.float64),
                "inner_kind": torch.tensor(list(self.inner.kind.encode()), dtype=torch.uint8)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        kind = DELTAS.get(bytes(tensors["inner_kind"].tolist()).decode())
        inner = kind.from_tensors({name.removeprefix("inner."): tensor for name, tensor in tensors.items()
                                   if name.startswith("inner.")})
        return cls(inner, tensors["magnitude"]).scaled(float(tensors["strength"]))

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """(W' − W) · x, the layer's own W · x computed for it."""
        W = weight_of(layer)
        dtype = compute_dtype(x, layer)
        with torch.autocast(x.device.type, enabled=False):
            x = x if isinstance(layer, nn.Embedding) else x.to(dtype)
            own = apply_weight(x, W.to(dtype), layer)
        return self._changed(torch.zeros_like(own), x, layer, own)

    def add_to(self, out: Tensor, x: Tensor, layer: nn.Module, plain: Tensor) -> Tensor:
        """out + (g − 1) · (plain − bias) + g · dW x, with g the gain."""
        bias = getattr(layer, "bias", None)
        own = plain if bias is None else plain - bias.to(plain).view(-1, *self.magnitude.shape[2:])
        return self._changed(out, x, layer, own)

    def _changed(self, out: Tensor, x: Tensor, layer: nn.Module, own: Tensor) -> Tensor:
        """out + strength · (W' − W) · x, where `own` is W · x."""
        W, gain = weight_of(layer), self._gain(weight_of(layer))
        if isinstance(layer, nn.Embedding):  # the input is one-hot: an input's gain is a token's
            gain = gain.T if self.by_output else gain.T[x]
            gain = gain[0] if self.by_output else gain
            less, gain = ((gain - 1) * self.strength).to(out), (gain * self.strength).to(out)
            return out + less * own.to(out.dtype) + gain * self.inner(x, layer).to(out.dtype)
        if self.by_output:
            gain = gain.view(-1, *(gain.shape[2:] if isinstance(layer, CONVOLUTIONS) else ()))
            less, gain = ((gain - 1) * self.strength).to(out), (gain * self.strength).to(out)
            return torch.addcmul(out, less, own.to(out.dtype)) + gain * self.inner(x, layer).to(out.dtype)
        if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:  # an input's place in its group has the gain
            gain = gain.repeat(1, layer.groups, *(1 for _ in gain.shape[2:]))
        gain = gain[0] if isinstance(layer, CONVOLUTIONS) else gain.view(-1)
        less, gain = ((gain - 1) * self.strength).to(out), (gain * self.strength).to(out)
        with torch.autocast(out.device.type, enabled=False):
            x = x.to(out.dtype)
            return out + apply_weight(x * less, W.to(out), layer) + self.inner(x * gain, layer).to(out.dtype)

    def extra_repr(self) -> str:
        return "by output" if self.by_output else "by input"
