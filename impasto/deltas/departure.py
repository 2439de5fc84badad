"""A low-rank delta that starts elsewhere than at zero, and counts from there: dW = scale · (B · A − B0 · A0).

With B0 · A0 the principal part of W this is PiSSA (Meng et al. 2024, arXiv:2404.02948), which trains B · A beside the
frozen residual W − B0 · A0. Here the base stays as it is, and the delta takes away what it began with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from impasto.deltas.delta import Delta
from impasto.deltas.lowrank import LowRank


class Departure(Delta):
    """What `learned` has become, less what it was: its factors then are kept, in buffers.

    As a LowRank it has twice the rank. Of the factorisations [B, −B0] [A; A0] and [B − B0, B0] [A; A − A0], which are
    equal, the latter is used: the first subtracts products of the size of W, which leaves little of dW in half
    precision; in the second both are small while dW is. Before the first step dW is zero to the bit.
    """

    kind: ClassVar[str] = "lora"

    def __init__(self, learned: LowRank, start: tuple[Tensor, Tensor] | None = None) -> None:
        """Trains `learned`, of which `start` (up, down) is taken away: by default what it is now."""
        super().__init__()
        self.learned, self.shape, self.rank = learned, learned.shape, learned.rank
        up, down = start or (learned.up, learned.down)
        self.up0: Tensor
        self.down0: Tensor
        self.register_buffer("up0", up.detach().clone())
        self.register_buffer("down0", down.detach().clone())
        with torch.device("meta"):
            self._shell = LowRank(self.shape, 2 * self.rank, learned.scale * 2 * self.rank, dropout=learned.dropout)
        del self._shell.up, self._shell.down  # in `whole` they are tensors, which a place of a parameter refuses

    def whole(self) -> LowRank:
        """The same as a LowRank of rank 2r; gradients flow through it to what is learned."""
        whole, learned = copy.copy(self._shell), self.learned
        ours: Any = whole  # tensors where a LowRank has parameters
        ours.up = torch.cat([learned.up - self.up0, self.up0], 1)
        ours.down = torch.cat([learned.down, learned.down - self.down0], 0)
        return whole

    def weight(self, W: Tensor | None = None) -> Tensor:
        return self.whole().weight(W)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.whole().factors()

    def scaled(self, strength: float) -> Self:
        learned = self.learned.scaled(strength)
        return type(self)(learned, (self.up0, self.down0))

    def tensors(self) -> dict[str, Tensor]:
        """Those of the LowRank of rank 2r."""
        return self.whole().tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        learned = LowRank.from_tensors(tensors)
        return cls(learned, (torch.zeros_like(learned.up), torch.zeros_like(learned.down)))

    def joined(self, other: Delta) -> Delta | None:
        return self.whole().joined(other)

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        return self.whole()(x, layer)

    def add_to(self, out: Tensor, x: Tensor, layer: nn.Module, plain: Tensor) -> Tensor:
        return self.whole().add_to(out, x, layer, plain)

    def snapshot(self) -> LowRank:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A frozen LowRank of rank 2r on the CPU: files know of no departure."""
        whole = self.whole()
        return LowRank.from_factors(whole.up.detach().cpu(), whole.down.detach().cpu(), whole.alpha).eval()


def principal(W: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triples U (out, r), S (r,), V^T (r, in) of W (out, in), in fp32.

    Exact where a whole decomposition is cheap or most of it is asked for; else by subspace iteration (Halko, Martinsson
    & Tropp 2011, algorithms 4.4 and 5.1) from a start that `generator` draws, with as many directions again as are
    asked for and eight passes: singular values come out within a hundredth of the largest even on the flat spectrum of
    noise. What is missed costs nothing but the choice of directions: the start is taken away as it is.
    """
    W = W.detach().float()
    smaller, width = min(W.shape), 2 * rank + 8
    if smaller <= 256 or 2 * width > smaller:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        Q = W @ torch.randn(W.shape[1], width, generator=generator, device=generator.device).to(W.device)
        for _ in range(8):
            Q = torch.linalg.qr(W.T @ torch.linalg.qr(Q).Q).Q
            Q = W @ Q
        Q = torch.linalg.qr(Q).Q
        inner, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
        U = Q @ inner
    return U[:, :rank], S[:rank], Vh[:rank]
