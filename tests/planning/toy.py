"""A method that the program does not know: full fine-tuning that keeps one more tensor for the backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from impasto.families.base import Base
from impasto.methods.full import Full

#: elements of what it keeps
KEPT = 12_345


class Keep(torch.autograd.Function):
    """x, which it keeps something beside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros(KEPT))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert len(ctx.saved_tensors) == 1
        return gradient


class Toy(Full):
    class Options(Full.Options):
        kind: Literal["toy"] = "toy"  # pyright: ignore[reportIncompatibleVariableOverride]

    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        def keep(module: nn.Module, given: Any, out: Tensor) -> Tensor:
            return Keep.apply(out)

        base.layer("unet.conv_in").register_forward_hook(keep)
        return super().prepare(base, seed)
