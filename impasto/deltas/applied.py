"""A weight that is built from factors and applied, of which only the factors are kept for the backward pass.

Autograd would keep every product of factors on the way to a weight until the backward pass, for a LoHa three times the
layer. Here the products are made again when they are needed.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.deltas.layers import CONVOLUTIONS, weight_of


class Build(abc.ABC):
    """A weight as a function of factors, with its derivative written out."""

    @abc.abstractmethod
    def forward(self, *factors: Tensor) -> Tensor:
        """The weight (n, in / groups, *kernel)."""

    @abc.abstractmethod
    def backward(self, grad: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each factor, from the weight's."""


@dataclass(frozen=True)
class Window:
    """How a layer lets a weight pass over its input; of a linear layer there is nothing to tell."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @staticmethod
    def of(layer: nn.Module, x: Tensor) -> tuple[Window, Tensor]:
        """A layer's window, and the input for it: padded beforehand where the window cannot say how."""
        if not isinstance(layer, CONVOLUTIONS):
            return Window(), x
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * len(layer.kernel_size)
        return Window(layer.stride, tuple(padding), layer.dilation, layer.groups), x

    @staticmethod
    def point(layer: nn.Module) -> Window:
        """That of a kernel of one, for what comes after `layer`'s own window."""
        if not isinstance(layer, CONVOLUTIONS):
            return Window()
        n = len(layer.kernel_size)
        return Window((1,) * n, (0,) * n, (1,) * n)

    def forward(self, x: Tensor, weight: Tensor, out: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """weight · x, and out, or a bias, on top of it where it is given."""
        if self.stride:
            y = torch.ops.aten.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False,
                                           [0] * len(self.stride), self.groups)
            return y if out is None else y.add_(out)
        if out is None:
            return F.linear(x, weight, bias)
        return torch.addmm(out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), weight.T).view(out.shape)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, x_needs: bool, weight_needs: bool,
                 ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and of the weight."""
        if self.stride:
            n = len(self.stride)
            dx, dw, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, self.stride, self.padding, self.dilation, False, [0] * n, self.groups,
                [x_needs, weight_needs, False])
            return dx, dw
        dx = grad @ weight if x_needs else None
        dw = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if weight_needs else None
        return dx, dw


def tokens_of(x: Tensor, shape: tuple[int, ...], window: Window) -> int:
    """Columns that the weight is multiplied with: of a convolution, its positions (with a stride, fewer)."""
    return x.numel() // (shape[1] * math.prod(window.stride))


def applied(x: Tensor, window: Window, build: Build, factors: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """build(*factors) · x, and `out` on top of it; for the backward pass x and the factors are kept, no more."""
    if window.stride and x.ndim == len(window.stride) + 1:  # one input, not a batch of them
        return applied(x[None], window, build, factors, None if out is None else out[None])[0]
    result = _Applied.apply(x, out, window, build, *factors)
    assert isinstance(result, Tensor)
    return result


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor | None, window: Window, build: Build, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.window, ctx.build = window, build
        return window.forward(x, build.forward(*factors), out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[4:])
        dx = dw = None
        if ctx.needs_input_grad[0] or wanted:
            weight = ctx.build.forward(*factors)
            dx, dw = ctx.window.backward(grad, x, weight, ctx.needs_input_grad[0], wanted)
        into = ctx.build.backward(dw, *factors) if wanted else (None,) * len(factors)
        return (dx, grad if ctx.needs_input_grad[1] else None, None, None, *into)


def instead(x: Tensor, layer: nn.Module, window: Window, build: Build, factors: tuple[Tensor, ...]) -> Tensor:
    """(W + build(*factors)) · x + bias of a frozen layer, in one product; for the backward pass x is kept, no more.

    Beside the layer's own product, dW · x takes three products in a training step. In its place it takes one, that of
    the gradient to dW.
    """
    if window.stride and x.ndim == len(window.stride) + 1:  # one input, not a batch of them
        return instead(x[None], layer, window, build, factors)[0]
    result = _Instead.apply(x, weight_of(layer), layer.bias, window, build, *factors)
    assert isinstance(result, Tensor)
    return result


class _Instead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: Tensor, bias: Tensor | None, window: Window, build: Build,
                *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, plain, *factors)
        ctx.window, ctx.build = window, build
        return window.forward(x, build.forward(*factors).add_(plain), None, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, plain, *factors = ctx.saved_tensors
        x_needs, wanted = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        # without a gradient to x only the shape of the weight is asked for
        weight = ctx.build.forward(*factors).add_(plain) if x_needs else plain
        dx, dw = ctx.window.backward(grad, x, weight, x_needs, wanted)
        del weight
        into = ctx.build.backward(dw, *factors) if wanted else (None,) * len(factors)
        return (dx, None, None, None, None, *into)
