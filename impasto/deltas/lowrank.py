"""LoRA: dW = scale · up · down (Hu et al. 2021, arXiv:2106.09685, section 4.1), or up · mid · down (LyCORIS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.delta import Delta, at_least_fp32, compute_dtype
from impasto.deltas.layers import CONVOLUTIONS, apply_weight


class LowRank(Delta):
    """dW = scale · up · down, with down flattened over (in, *kernel).

    up (out, r, 1, …) and down (r, in / groups, *kernel), as many dimensions as the layer's weight. The scale is
    alpha / r, or alpha / √r if rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732); alpha None is r. With a Tucker
    core mid (r, r, *kernel), down is (r, in / groups, 1, …): a layer's kernel costs r² parameters a tap, not r · in.
    `dropout` is the probability of leaving out an input, in training (Hu et al.'s code and peft).
    """

    kind: ClassVar[str] = "lora"

    def __init__(self, shape: tuple[int, ...], rank: int, alpha: float | None = None, *, rslora: bool = False,
                 dropout: float = 0.0, tucker: bool = False) -> None:
        """A trainable one of zeros in fp32; see `initialise`. A Tucker core needs a kernel."""
        if rank < 1:
            raise UserError(f"rank is {rank}", fix="a rank is 1 or more")
        if tucker and len(shape) < 3:
            raise UserError(f"a layer of shape {tuple(shape)} has no kernel for a Tucker core")
        super().__init__()
        self.shape, self.rank = tuple(shape), rank
        self.alpha, self.rslora, self.dropout = float(rank if alpha is None else alpha), rslora, dropout
        ones = tuple(1 for _ in shape[2:])
        self.up = nn.Parameter(torch.zeros(shape[0], rank, *ones))
        self.down = nn.Parameter(torch.zeros(rank, shape[1], *(ones if tucker else shape[2:])))
        self.mid: nn.Parameter | None
        self.register_parameter("mid", nn.Parameter(torch.zeros(rank, rank, *shape[2:])) if tucker else None)

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, alpha: float | None = None, mid: Tensor | None = None, *,
                     rslora: bool = False) -> Self:
        """Around given factors, which are kept as they are (dtype, device) and frozen.

        `up` may also be (out, r) where `down` has a kernel. Raises `UserError` if they do not fit together.
        """
        if up.ndim == 2:
            up = up[(..., *(None for _ in down.shape[2:]))]
        if down.ndim < 2 or up.shape[1:] != (down.shape[0], *(1 for _ in down.shape[2:])):
            raise UserError(f"factors {tuple(up.shape)} and {tuple(down.shape)} do not fit together")
        shape = (up.shape[0], *down.shape[1:])
        if mid is not None:
            if mid.ndim != down.ndim or mid.shape[:2] != 2 * down.shape[:1] or down.shape != (*down.shape[:2], *(
                    1 for _ in mid.shape[2:])):
                raise UserError(f"factors {tuple(mid.shape)} and {tuple(down.shape)} do not fit together")
            shape = (*shape[:2], *mid.shape[2:])
        with torch.device("meta"):
            delta = cls(shape, down.shape[0], alpha, rslora=rslora, tucker=mid is not None)
        delta.up = nn.Parameter(up.detach(), requires_grad=False)
        delta.down = nn.Parameter(down.detach(), requires_grad=False)
        if mid is not None:
            delta.mid = nn.Parameter(mid.detach(), requires_grad=False)
        return delta

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """down uniform in ±1/√(in · kernel), that is, Kaiming's with a = √5; up zero (LoRA's code, kohya, peft).

        A core like down (LyCORIS).
        """
        for factor in (self.down,) if self.mid is None else (self.down, self.mid):
            bound = 1 / math.sqrt(factor[0].numel())
            draw = torch.rand(factor.shape, generator=generator, device=generator.device)
            factor.copy_(draw.mul_(2).sub_(1).mul_(bound))
        self.up.zero_()

    @property
    def scale(self) -> float:
        """What up · down is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def weight(self, W: Tensor | None = None) -> Tensor:
        up, down = self.factors()
        return (up @ down.flatten(1)).view(self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up · scale, down); never None."""
        up, down = at_least_fp32(self.up).flatten(1) * self.scale, at_least_fp32(self.down)
        if self.mid is not None:
            down = torch.einsum("pj...,ji->pi...", at_least_fp32(self.mid), down.flatten(1))
        return up, down

    def scaled(self, strength: float) -> Self:
        return type(self).from_factors(self.up, self.down, self.alpha * strength, self.mid, rslora=self.rslora)

    def tensors(self) -> dict[str, Tensor]:
        """up, down, mid where there, and alpha (fp64, of a plain scale alpha / rank)."""
        core = {} if self.mid is None else {"mid": self.mid}
        return {"up": self.up, "down": self.down, **core,
                "alpha": torch.tensor(self.scale * self.rank, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls.from_factors(tensors["up"], tensors["down"], float(tensors["alpha"]), tensors.get("mid"))

    def joined(self, other: Delta) -> LowRank | None:
        """The factors side by side, rank r1 + r2, scale 1: exact, unlike a mean of the factors."""
        if not isinstance(other, LowRank):
            return None
        (up1, down1), (up2, down2) = self.factors(), other.factors()
        return LowRank.from_factors(torch.cat([up1, up2.to(up1)], 1), torch.cat([down1, down2.to(down1)], 0))

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """scale · up · (down · x): two thin products. A grouped convolution takes the dense matrix."""
        dtype = compute_dtype(x, layer)
        with torch.autocast(x.device.type, enabled=False):  # dtypes are settled here, for lookups too
            if _is_grouped(layer):
                return apply_weight(self._dropped(x).to(dtype), self.weight().to(x.device, dtype), layer)
            h, up = self._thin(x, layer, dtype), self.up.to(x.device, dtype) * self.scale
            return _pointwise(h, up) if isinstance(layer, CONVOLUTIONS) else F.linear(h, up)

    def add_to(self, out: Tensor, x: Tensor, layer: nn.Module, plain: Tensor) -> Tensor:
        """out + dW · x, the sum made inside the product: no other tensor of out's size, one rounding."""
        if isinstance(layer, CONVOLUTIONS):
            return super().add_to(out, x, layer, plain)
        with torch.autocast(x.device.type, enabled=False):
            h, up = self._thin(x, layer, out.dtype), self.up.to(out.device, out.dtype)
            total = torch.addmm(out.reshape(-1, self.shape[0]), h.reshape(-1, self.rank), up.T, alpha=self.scale)
        return total.view(out.shape)

    def _thin(self, x: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """down · x, with r features."""
        down = self.down.to(x.device, dtype)
        if self.mid is not None:  # the layer's window is the core's; a point and its padding commute
            return apply_weight(_pointwise(self._dropped(x).to(dtype), down), self.mid.to(x.device, dtype), layer)
        if not isinstance(layer, nn.Embedding):
            return apply_weight(self._dropped(x).to(dtype), down, layer)
        h = apply_weight(x, down, layer)
        # the input is a one-hot vector: dropout leaves out the one, that is, the whole row
        return h * self._dropped(torch.ones_like(x, dtype=dtype))[..., None] if self.dropout else h

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def extra_repr(self) -> str:
        return f"{self.shape}, rank={self.rank}, alpha={self.alpha:g}" + (
            ", rslora" if self.rslora else "") + (", tucker" if self.mid is not None else "")


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.groups > 1


def _pointwise(h: Tensor, up: Tensor) -> Tensor:
    """A convolution with a kernel of one."""
    return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[up.ndim](h, up)
