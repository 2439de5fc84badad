"""LoHa: dW = scale · (w1_a · w1_b) ∘ (w2_a · w2_b) (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.applied import Build, Window, applied, instead, tokens_of
from impasto.deltas.delta import Onto, at_least_fp32, takes_sums
from impasto.deltas.layers import apply_weight

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")


class Hadamard(Onto):
    """dW = alpha / r · (w1_a · w1_b) ∘ (w2_a · w2_b), of a rank up to r².

    w_a (out, r) and w_b (r, in · kernel). With Tucker cores t1, t2 (r, r, *kernel), w_a is (r, out), w_b (r, in) and
    each half Σ_ij t[i, j, k] · w_b[j, in] · w_a[i, out]: as LyCORIS stores them. alpha None is r.
    """

    kind: ClassVar[str] = "loha"
    w1_a: nn.Parameter
    w1_b: nn.Parameter
    w2_a: nn.Parameter
    w2_b: nn.Parameter
    t1: nn.Parameter | None
    t2: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], rank: int, alpha: float | None = None, *, tucker: bool = False) -> None:
        """A trainable one of zeros in fp32; see `initialise`. Tucker cores need a kernel."""
        if rank < 1:
            raise UserError(f"rank is {rank}", fix="a rank is 1 or more")
        if tucker and len(shape) < 3:
            raise UserError(f"a layer of shape {tuple(shape)} has no kernel for a Tucker core")
        super().__init__()
        self.shape, self.rank, self.alpha = tuple(shape), rank, float(rank if alpha is None else alpha)
        out, into, kernel = shape[0], shape[1], shape[2:]
        for half in ("1", "2"):
            if tucker:
                self._set(f"w{half}_a", torch.zeros(rank, out))
                self._set(f"w{half}_b", torch.zeros(rank, into))
            else:
                self._set(f"w{half}_a", torch.zeros(out, rank))
                self._set(f"w{half}_b", torch.zeros(rank, into * math.prod(kernel)))
            self._set(f"t{half}", torch.zeros(rank, rank, *kernel) if tucker else None)

    def _set(self, name: str, tensor: Tensor | None, trains: bool = True) -> None:
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=trains))

    @classmethod
    def from_factors(cls, shape: tuple[int, ...], w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor,
                     alpha: float | None = None, *, t1: Tensor | None = None, t2: Tensor | None = None) -> Self:
        """Around given factors, which are kept as they are (dtype, device) and frozen.

        Raises `UserError` if they do not fit together, or the shape.
        """
        given = dict(zip(NAMES, (w1_a, w1_b, w2_a, w2_b, t1, t2), strict=True))
        if (t1 is None) != (t2 is None):
            raise UserError("one half has a Tucker core and the other has none")
        with torch.device("meta"):
            delta = cls(shape, w1_b.shape[0], alpha, tucker=t1 is not None)
        for name, tensor in given.items():
            expected = getattr(delta, name)
            if tensor is not None and tensor.shape != expected.shape:
                raise UserError(f"{name} is {tuple(tensor.shape)}, where a change of {tuple(shape)} of rank "
                                f"{delta.rank} has {tuple(expected.shape)}")
            delta._set(name, None if tensor is None else tensor.detach(), trains=False)
        return delta

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Cores and w1_a normal with σ = 0.1, w1_b and w2_b with σ = 1, w2_a zero (LyCORIS' LohaModule; peft
        draws all by Kaiming's uniform, with w2_b zero)."""
        for name, std in (("t1", 0.1), ("t2", 0.1), ("w1_b", 1.0), ("w1_a", 0.1), ("w2_b", 1.0)):
            if (factor := getattr(self, name)) is not None:
                factor.copy_(torch.randn(factor.shape, generator=generator, device=generator.device).mul_(std))
        self.w2_a.zero_()

    @property
    def scale(self) -> float:
        """What the product of the halves is multiplied by."""
        return self.alpha / self.rank

    @property
    def tucker(self) -> bool:
        return self.t1 is not None

    def weight(self, W: Tensor | None = None) -> Tensor:
        a1, b1, a2, b2 = map(at_least_fp32, self._halves())
        return ((a1 @ b1) * (a2 @ b2) * self.scale).view(self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Those of a LoRA of rank r²: up[o, pq] = w1_a[o, p] · w2_a[o, q], down[pq, i] = w1_b[p, i] · w2_b[q, i]."""
        a1, b1, a2, b2 = map(at_least_fp32, self._halves())
        down = KhatriRao((*self.shape[1:],)).forward(b1, b2)
        return _pairs(a1.T, a2.T).T * self.scale, down

    def _halves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w1_a (out, r), w1_b (r, in · kernel), w2_a, w2_b: with cores, each core multiplied into its w_b.

        Then a Tucker LoHa is a plain one; its dW has the same elements.
        """
        if self.t1 is None or self.t2 is None:
            return self.w1_a, self.w1_b, self.w2_a, self.w2_b
        return self.w1_a.T, _core(self.t1, self.w1_b), self.w2_a.T, _core(self.t2, self.w2_b)

    def scaled(self, strength: float) -> Self:
        return type(self).from_factors(self.shape, self.w1_a, self.w1_b, self.w2_a, self.w2_b,
                                       self.alpha * strength, t1=self.t1, t2=self.t2)

    def tensors(self) -> dict[str, Tensor]:
        """w1_a, w1_b, w2_a, w2_b, t1 and t2 where there; alpha (fp64) and shape (int64)."""
        held = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        return held | {"alpha": torch.tensor(self.alpha, dtype=torch.float64), "shape": torch.tensor(self.shape)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls.from_factors(tuple(tensors["shape"].tolist()), tensors["w1_a"], tensors["w1_b"], tensors["w2_a"],
                                tensors["w2_b"], float(tensors["alpha"]), t1=tensors.get("t1"),
                                t2=tensors.get("t2"))

    def instead(self, x: Tensor, layer: nn.Module) -> Tensor | None:
        """(W + dW) · x + bias in one product, where the factors of rank r² cost more than that of dW's gradient."""
        if not takes_sums(x, layer):
            return None
        window, x = Window.of(layer, x)
        if window.groups == 1 and by_factors(self.rank, tokens_of(x, self.shape, window), self.shape, products=1):
            return None
        a1, b1, a2, b2 = (half.to(x) for half in self._halves())
        return instead(x, layer, window, Product(self.shape), (a1 * self.scale, b1, a2, b2))

    def onto(self, x: Tensor, layer: nn.Module, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """By the factors of rank r² or by the dense matrix, whichever costs less; the sum is part of the product."""
        with torch.autocast(x.device.type, enabled=False):  # dtypes are settled here
            a1, b1, a2, b2 = (half.to(x.device, dtype) for half in self._halves())
            if isinstance(layer, nn.Embedding):  # a lookup of columns of both halves
                h1, h2 = apply_weight(x, b1, layer) @ a1.T, apply_weight(x, b2, layer) @ a2.T
                return h1 * h2 * self.scale if out is None else out + h1 * h2 * self.scale
            window, x = Window.of(layer, x.to(dtype))
            if window.groups == 1 and by_factors(self.rank, tokens_of(x, self.shape, window), self.shape):
                h = applied(x, window, KhatriRao(self.shape[1:]), (b1, b2))
                up = KhatriRaoUp((1,) * len(self.shape[2:]))
                return applied(h, Window.point(layer), up, (a1 * self.scale, a2), out)
            return applied(x, window, Product(self.shape), (a1 * self.scale, b1, a2, b2), out)

    def extra_repr(self) -> str:
        return f"{self.shape}, rank={self.rank}, alpha={self.alpha:g}" + (", tucker" if self.tucker else "")


def by_factors(rank: int, tokens: int, shape: tuple[int, ...], products: int = 3) -> bool:
    """Whether two products of rank r² take less time than with the dense matrix, in a training step.

    Forward and backward are three products of `tokens` columns each; with the dense matrix, `products`: three, or one
    where it is added to the layer's own. To build the dense matrix takes eight products of rank r (two forward, the
    same again backward, and one for each factor's gradient) and passes over it; to build the factors, passes; and they
    pass over the layer's inputs and outputs once more. Costs are in multiply-adds.
    """
    out, into = shape[0], math.prod(shape[1:])
    thin = (out + into) * (tokens * (3 * rank**2 + THIN_PASSES) + rank**2 * FACTOR_PASSES)
    dense = out * into * (products * tokens + 8 * rank + DENSE_PASSES)
    return thin < dense


#: Multiply-adds in the time of all passes over one number: of inputs and outputs, of the factors of rank r², of the
#: dense matrix. Fitted to `python -m benchmarks.routes` on one core of a Xeon with AVX-512, fp32, at 256² with
#: ranks 8 and 16. A dense matrix of more than 32 MB costs three times DENSE_PASSES, as glibc fetches its
#: memory from the system each time; at such sizes the factors win anyway.
THIN_PASSES, FACTOR_PASSES, DENSE_PASSES = 80, 240, 300


def _core(t: Tensor, b: Tensor) -> Tensor:
    """t (r, r, *kernel) and b (r, in) as one (r, in · kernel)."""
    return torch.einsum("pj...,ji->pi...", t, b).flatten(1)


def _pairs(one: Tensor, two: Tensor) -> Tensor:
    """(r, n) and (s, n): the products of each pair of rows, (r · s, n)."""
    return (one[:, None] * two[None]).flatten(0, 1)


def _unpaired(grad: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both, from that of `_pairs`."""
    grad = grad.reshape(one.shape[0], two.shape[0], -1)
    return (grad * two[None]).sum(1), (grad * one[:, None]).sum(0)


@dataclass(frozen=True)
class KhatriRao(Build):
    """down[pq, i] = b1[p, i] · b2[q, i], as a weight (r², *tail)."""

    tail: tuple[int, ...]

    def forward(self, *factors: Tensor) -> Tensor:
        return _pairs(*factors).view(-1, *self.tail)

    def backward(self, grad: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return _unpaired(grad, *factors)


@dataclass(frozen=True)
class KhatriRaoUp(Build):
    """up[o, pq] = a1[o, p] · a2[o, q], as a weight (out, r², *ones)."""

    ones: tuple[int, ...]

    def forward(self, *factors: Tensor) -> Tensor:
        one, two = factors
        return (one[:, :, None] * two[:, None]).view(one.shape[0], -1, *self.ones)

    def backward(self, grad: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        one, two = factors
        grad = grad.reshape(one.shape[0], one.shape[1], two.shape[1])
        return (grad @ two[:, :, None])[..., 0], (one[:, None] @ grad)[:, 0]


@dataclass(frozen=True)
class Product(Build):
    """(a1 · b1) ∘ (a2 · b2), as a weight of `shape`."""

    shape: tuple[int, ...]

    def forward(self, *factors: Tensor) -> Tensor:
        a1, b1, a2, b2 = factors
        return (a1 @ b1).mul_(a2 @ b2).view(self.shape)

    def backward(self, grad: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = factors
        grad = grad.reshape(self.shape[0], -1)
        half = (a2 @ b2).mul_(grad)
        first = half @ b1.T, a1.T @ half
        half = torch.mm(a1, b1, out=half).mul_(grad)
        return *first, half @ b2.T, a2.T @ half
