"""LoKr: dW = scale · w1 ⊗ w2 (Edalati et al. 2022, arXiv:2212.10650; Yeh et al. 2024, arXiv:2309.14859; LyCORIS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.applied import Build, Window, instead, tokens_of
from impasto.deltas.delta import Delta, Onto, at_least_fp32, takes_sums
from impasto.deltas.layers import CONVOLUTIONS, apply_weight

NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """size = m · n with m ≤ n, as LyCORIS splits it: m the factor if it divides, else the largest divisor below it
    that brings m and n nearer to each other; with -1 the two nearest to the square root."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    m = next(m for m in range(max(limit, 1), 0, -1) if size % m == 0)
    return m, size // m


class Kronecker(Onto):
    """dW = scale · w1 ⊗ w2, with w1 (o1, i1), w2 (o2, i2, *kernel), out = o1 · o2 and in = i1 · i2.

    Either may be a product: w1 = w1_a (o1, r) · w1_b (r, i1); w2 = w2_a (o2, r) · w2_b (r, i2 · kernel), or with a
    Tucker core t2 (r, r, *kernel), w2_a (r, o2) and w2_b (r, i2), as LyCORIS stores them. The scale is alpha / r where
    one is a product, else 1, and alpha has no meaning. alpha None is r.
    """

    kind: ClassVar[str] = "lokr"
    w1: nn.Parameter | None
    w1_a: nn.Parameter | None
    w1_b: nn.Parameter | None
    w2: nn.Parameter | None
    w2_a: nn.Parameter | None
    w2_b: nn.Parameter | None
    t2: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], rank: int, alpha: float | None = None, *, factor: int = -1,
                 full: bool = False, decompose_both: bool = False, tucker: bool = False) -> None:
        """A trainable one of zeros in fp32; see `initialise`.

        A factor is whole where `full` says so, or its rank would be half of its larger side or more (LyCORIS); w1 too
        unless `decompose_both`.
        """
        if rank < 1:
            raise UserError(f"rank is {rank}", fix="a rank is 1 or more")
        super().__init__()
        kernel = tuple(shape[2:])
        (o1, o2), (i1, i2) = factorization(shape[0], factor), factorization(shape[1], factor)
        split1 = decompose_both and not full and rank < max(o1, i1) / 2
        split2 = not full and rank < max(o2, i2) / 2
        core = tucker and split2 and any(side != 1 for side in kernel)
        sizes: dict[str, tuple[int, ...]] = {"w1_a": (o1, rank), "w1_b": (rank, i1)} if split1 else {"w1": (o1, i1)}
        if core:
            sizes |= {"w2_a": (rank, o2), "w2_b": (rank, i2), "t2": (rank, rank, *kernel)}
        elif split2:
            sizes |= {"w2_a": (o2, rank), "w2_b": (rank, i2 * math.prod(kernel))}
        else:
            sizes |= {"w2": (o2, i2, *kernel)}
        self._hold(tuple(shape), {name: torch.zeros(size) for name, size in sizes.items()}, alpha, trains=True)

    def _hold(self, shape: tuple[int, ...], given: Mapping[str, Tensor], alpha: float | None, trains: bool) -> None:
        for name in NAMES:
            held = nn.Parameter(given[name].detach(), requires_grad=trains) if name in given else None
            self.register_parameter(name, held)
        self.shape = shape
        low = self.w2_b if self.w2_b is not None else self.w1_b
        self.rank = low.shape[0] if low is not None else 0
        self.alpha = float((self.rank or 1) if alpha is None else alpha)
        #: a strength, where there is no alpha to take it
        self.strength = 1.0

    @classmethod
    def from_factors(cls, shape: tuple[int, ...], *, w1: Tensor | None = None, w1_a: Tensor | None = None,
                     w1_b: Tensor | None = None, w2: Tensor | None = None, w2_a: Tensor | None = None,
                     w2_b: Tensor | None = None, t2: Tensor | None = None, alpha: float | None = None) -> Self:
        """Around given factors, which are kept as they are (dtype, device) and frozen.

        w2_b may also have its kernel as dimensions of its own (peft). Raises `UserError` if they do not fit.
        """
        given = {name: tensor for name, tensor in
                 zip(NAMES, (w1, w1_a, w1_b, w2, w2_a, w2_b, t2), strict=True) if tensor is not None}
        for whole in ("w1", "w2"):
            pair = {f"{whole}_a", f"{whole}_b"} & given.keys()
            if (whole in given) == bool(pair) or len(pair) == 1:
                raise UserError(f"{whole} is wanted, or both {whole}_a and {whole}_b; there are {', '.join(given)}")
        if t2 is not None and w2 is not None:
            raise UserError("a Tucker core t2 belongs to w2_a and w2_b, not to a whole w2")
        delta = cls.__new__(cls)
        Delta.__init__(delta)
        delta._hold(tuple(shape), {name: factor.to("meta") for name, factor in given.items()}, alpha, trains=False)
        try:
            (o1, i1), two = delta._first().shape, delta._second()
            made = (o1 * two.shape[0], i1 * two.shape[1], *two.shape[2:])
        except (RuntimeError, ValueError):
            made = None
        if made != delta.shape:
            sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
            raise UserError(f"factors {sizes} do not make a change of {tuple(shape)}")
        delta._hold(tuple(shape), given, alpha, trains=False)
        return delta

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Kaiming's uniform with a = √5, ±1/√fan-in, but w2, or w2_b, zero (LyCORIS' LokrModule)."""
        zero = self.w2 if self.w2 is not None else self.w2_b
        for name in NAMES:
            factor = getattr(self, name)
            if factor is zero or factor is None:
                continue
            draw = torch.rand(factor.shape, generator=generator, device=generator.device)
            factor.copy_(draw.mul_(2).sub_(1).div_(math.sqrt(factor[0].numel())))
        assert zero is not None
        zero.zero_()

    @property
    def scale(self) -> float:
        """What w1 ⊗ w2 is multiplied by."""
        return self.strength * (self.alpha / self.rank if self.rank else 1.0)

    def _held(self, name: str, like: Tensor | None) -> Tensor:
        factor = getattr(self, name)
        return at_least_fp32(factor) if like is None else factor.to(like)

    def _first(self, like: Tensor | None = None) -> Tensor:
        """w1 (o1, i1), multiplied out; in at least fp32, or as another tensor is."""
        return self._held("w1", like) if self.w1 is not None else self._held("w1_a", like) @ self._held("w1_b", like)

    def _second(self, like: Tensor | None = None) -> Tensor:
        """w2 (o2, i2, *kernel), likewise."""
        if self.w2 is not None:
            return self._held("w2", like)
        a, b = self._thin(like)
        return (a @ b.flatten(1)).view(a.shape[0], *b.shape[1:])

    def _thin(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a (o2, r) and b (r, i2, *kernel) with w2 = a · b; a Tucker core is multiplied into b."""
        a, b = self._held("w2_a", like), self._held("w2_b", like)
        if self.t2 is not None:
            return a.T, torch.einsum("pj...,ji->pi...", self._held("t2", like), b)
        return a, b.reshape(b.shape[0], -1, *self.shape[2:])

    def weight(self, W: Tensor | None = None) -> Tensor:
        one, two = self._first(), self._second()
        return _kron(one * self.scale, two)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Where w2 = a · b: (w1 ⊗ a) and (1 ⊗ b), of rank i1 · r; or of o1 · r, (1 ⊗ a) and (w1 ⊗ b), if less."""
        if self.w2 is not None:
            return None
        one, (a, b) = self._first(), self._thin()
        up, down = one, torch.eye(one.shape[1]).to(one)
        if one.shape[0] < one.shape[1]:
            up, down = torch.eye(one.shape[0]).to(one), one
        return _kron(up * self.scale, a), _kron(down, b)

    def scaled(self, strength: float) -> Self:
        held = {name: getattr(self, name) for name in NAMES}
        scaled = type(self).from_factors(self.shape, **held, alpha=self.alpha)
        scaled.strength = self.strength * strength
        return scaled

    def tensors(self) -> dict[str, Tensor]:
        """The factors that are there; alpha (fp64) and shape (int64). A strength is in alpha; where that has no
        meaning, in w1."""
        held = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        alpha = self.alpha
        if self.rank:
            alpha *= self.strength
        elif self.strength != 1.0:
            held["w1"] = at_least_fp32(held["w1"]) * self.strength
        return held | {"alpha": torch.tensor(alpha, dtype=torch.float64), "shape": torch.tensor(self.shape)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        held = {name: tensors.get(name) for name in NAMES}
        return cls.from_factors(tuple(tensors["shape"].tolist()), **held, alpha=float(tensors["alpha"]))

    def instead(self, x: Tensor, layer: nn.Module) -> Tensor | None:
        """(W + dW) · x + bias in one product, where two small ones beside it cost more."""
        if not takes_sums(x, layer):
            return None
        window, x = Window.of(layer, x)
        one, two = self._first(x) * self.scale, self._second(x)
        if window.groups == 1 and by_factors(one.shape, two.shape, self._inner(), tokens_of(x, self.shape, window)):
            return None
        return instead(x, layer, window, Product(tuple(one.shape), tuple(two.shape)), (one, two))

    def _inner(self) -> int:
        """The rank of w2's product where `_grouped` takes its factors, else 0."""
        if self.w2_b is None:
            return 0
        a, b = self._thin()
        return self.rank if a.shape[0] * b[0].numel() > self.rank * (a.shape[0] + b[0].numel()) else 0

    def onto(self, x: Tensor, layer: nn.Module, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Without dW: w2 on each of i1 groups of inputs, then the groups mixed by w1."""
        with torch.autocast(x.device.type, enabled=False):  # dtypes are settled here
            if isinstance(layer, nn.Embedding) or isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
                y = apply_weight(x if isinstance(layer, nn.Embedding) else x.to(dtype),
                                 self.weight().to(x.device, dtype), layer)
                return y if out is None else out + y
            x = x.to(dtype)
            one = self._first(x) * self.scale
            if isinstance(layer, CONVOLUTIONS):
                return self._convolved(x, one, layer, out)
            h = self._grouped(x.reshape(-1, one.shape[1], x.shape[-1] // one.shape[1]), layer)
            one = one.expand(h.shape[0], *one.shape)
            if out is None:
                return torch.bmm(one, h).view(*x.shape[:-1], self.shape[0])
            return torch.baddbmm(out.reshape(h.shape[0], one.shape[1], h.shape[2]), one, h).view(out.shape)

    def _convolved(self, x: Tensor, one: Tensor, layer: nn.Module, out: Tensor | None) -> Tensor:
        """x (n, i1 · i2, …): w2 passes over the groups as over a batch n · i1, then w1 mixes them."""
        batched = x if x.ndim == len(self.shape) else x[None]
        n, i1 = batched.shape[0], one.shape[1]
        h = self._grouped(batched.reshape(n * i1, batched.shape[1] // i1, *batched.shape[2:]), layer)
        y = torch.matmul(one, h.reshape(n, i1, math.prod(h.shape[1:]))).view(n, self.shape[0], *h.shape[2:])
        y = y if x.ndim == len(self.shape) else y[0]
        return y if out is None else out + y

    def _grouped(self, x: Tensor, layer: nn.Module) -> Tensor:
        """w2 · x: by its two thin factors where these take fewer multiplications."""
        if self.w2 is not None:
            return apply_weight(x, self._second(x), layer)
        a, b = self._thin(x)
        if not self._inner():
            return apply_weight(x, self._second(x), layer)
        h = apply_weight(x, b, layer)
        return {2: F.linear, 3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(self.shape)](
            h, a.reshape(*a.shape, *(1 for _ in self.shape[2:])))

    def extra_repr(self) -> str:
        held = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in NAMES
                         if getattr(self, name) is not None)
        return f"{self.shape}, {held}, alpha={self.alpha:g}"


def by_factors(first: tuple[int, ...], second: tuple[int, ...], inner: int, tokens: int) -> bool:
    """Whether w2 on each group and w1 across them take less time than w1 ⊗ w2 in the layer's own product.

    first and second are the shapes of w1 and w2, inner w2's rank or 0. Three small products of `tokens` columns forward
    and backward, which pass over inputs and outputs, against one large one for the gradient to w1 ⊗ w2 and passes over
    that. Costs are in multiply-adds.
    """
    (o1, i1), (o2, i2) = first, (second[0], math.prod(second[1:]))
    small = i1 * (inner * (o2 + i2) if inner else o2 * i2) + o1 * i1 * o2
    thin = tokens * (3 * small + THIN_PASSES * (o1 * o2 + i1 * i2))
    return thin < o1 * o2 * i1 * i2 * (tokens + DENSE_PASSES)


#: Multiply-adds in the time of all passes over one number: of inputs and outputs, of w1 ⊗ w2. Fitted to
#: `python -m benchmarks.routes --kinds lokr` on one core of a Xeon with AVX-512, fp32.
THIN_PASSES, DENSE_PASSES = 160, 240


@dataclass(frozen=True)
class Product(Build):
    """w1 ⊗ w2, of matrices of these shapes."""

    first: tuple[int, ...]
    second: tuple[int, ...]

    def forward(self, *factors: Tensor) -> Tensor:
        return _kron(*factors)

    def backward(self, grad: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        one, two = factors
        (o1, i1), (o2, i2, *kernel) = self.first, self.second
        blocks = grad.reshape(o1, o2, i1, i2 * math.prod(kernel)).transpose(1, 2).reshape(o1 * i1, -1)
        return (blocks @ two.flatten()).view(o1, i1), (one.flatten() @ blocks).view(self.second)


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """one (a, b) ⊗ two (c, d, *kernel), (a · c, b · d, *kernel). torch.kron fails on some views."""
    product = one[(slice(None), None, slice(None), None, *(None for _ in two.shape[2:]))] * two[None, :, None]
    return product.reshape(one.shape[0] * two.shape[0], one.shape[1] * two.shape[1], *two.shape[2:])
