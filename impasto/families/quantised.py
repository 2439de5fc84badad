"""Layers whose frozen weight is held in few bits, and made anew where it is multiplied.

In the forward a layer's weight is made, used and let go; the backward, which needs it for the input's gradient, makes
it again. So no more than one of them is there at a time. What trains stands beside the layer (`deltas.attach`), as it
does beside a layer of any other kind: QLoRA (Dettmers et al. 2023), with whichever delta.

Of a network the linear layers and convolutions of its blocks are held so; what lies before and after them, norms,
biases and embeddings are few numbers, and stay as they are.
"""

from __future__ import annotations

import re
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from impasto.core.errors import UserError
from impasto.families.codes import CODES, Code

#: where the blocks of diffusers' and transformers' networks are
_IN_BLOCKS = re.compile(r"(^|\.)(down_blocks|mid_block|up_blocks|transformer_blocks|layers|block)\.")

Geometry = tuple[Any, ...]  # of a convolution: stride, padding, dilation, groups; of a linear layer ()


class Quantised(Protocol):
    """A layer of this module."""

    quantised: str  # a name of CODES
    shape: tuple[int, ...]
    dtype: torch.dtype  # in which its weight is made

    def take(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Hold this weight from now on, where it is, and make it in `dtype`."""
        ...


class _Product(torch.autograd.Function):
    """A weight that is made of its parts, times x; the parts are all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, code: Code, shape: tuple[int, ...], dtype: torch.dtype,
                geometry: Geometry, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.told, ctx.geometry, ctx.shape, ctx.dtype = (code, shape, dtype), geometry, x.shape, x.dtype
        return _times(code.unpack(parts, shape, dtype), x, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        assert not ctx.needs_input_grad[1], "a bias that trains beside a weight that cannot"
        if not ctx.needs_input_grad[0]:
            return (None,) * len(ctx.needs_input_grad)
        code, shape, dtype = ctx.told
        weight = code.unpack(ctx.saved_tensors, shape, dtype).to(gradient.dtype)  # which autocast may have lowered
        dx = conv2d_input(ctx.shape, weight, gradient, *ctx.geometry) if ctx.geometry else gradient @ weight
        return dx.to(ctx.dtype), *(None,) * (len(ctx.needs_input_grad) - 1)


def _times(weight: Tensor, x: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return F.conv2d(x, weight, bias, *geometry) if geometry else F.linear(x, weight, bias)


class _Held(nn.Module):
    """What both kinds of layers have."""

    quantised: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    geometry: Geometry

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(cast(Tensor, self._buffers[name]) for name in CODES[self.quantised].parts)

    def _made(self) -> Tensor:
        return CODES[self.quantised].unpack(self._parts(), self.shape, self.dtype)

    def take(self, weight: Tensor, dtype: torch.dtype) -> None:
        code = CODES[self.quantised]
        self.dtype = dtype
        for name, part in zip(code.parts, code.pack(weight.detach(), dtype), strict=True):
            self.register_buffer(name, part, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which decides by itself what is kept
            return _times(self._made(), input, self._parameters["bias"], self.geometry)
        out = _Product.apply(input, self._parameters["bias"], CODES[self.quantised], self.shape, self.dtype,
                             self.geometry, *self._parts())
        return cast(Tensor, out)


class QuantisedLinear(_Held, nn.Linear):
    """A linear layer; its `weight` is made when it is asked for."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._made()


class QuantisedConv2d(_Held, nn.Conv2d):
    """A convolution; likewise."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._made()


def quantise(network: nn.Module, kind: str) -> None:
    """Hold the weights of a network's blocks as `kind`, a name of CODES, from now on, in place.

    Of one on the meta device the numbers are still to come (`networks.fill`).
    """
    for path, layer in list(network.named_modules()):
        if _IN_BLOCKS.search(path) and (held := _class_for(layer)) is not None:
            weight = layer._parameters.pop("weight")
            assert weight is not None and not weight.requires_grad, path
            layer.__class__ = held
            taking = cast(Quantised, layer)
            taking.quantised, taking.shape = kind, tuple(weight.shape)
            setattr(layer, "geometry", _geometry(layer))  # noqa: B010
            taking.take(weight, weight.dtype)


def quantised_layers(network: nn.Module) -> dict[str, Quantised]:
    """The layers of a network that are held so, by the path of their weight."""
    return {f"{path}.weight": cast(Quantised, layer) for path, layer in network.named_modules()
            if isinstance(layer, _Held)}


def check_device(kind: str, device: torch.device | str) -> None:
    """Raise `UserError` where the device has no such numbers."""
    if kind == "fp8" and torch.device(device).type == "mps":
        raise UserError("mps has no float8", where="base.quantize", fix="take int8 or nf4")


def _class_for(layer: nn.Module) -> type[nn.Module] | None:
    if type(layer) is nn.Linear:
        return QuantisedLinear
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return QuantisedConv2d
    return None


def _geometry(layer: nn.Module) -> Geometry:
    return (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else ()
