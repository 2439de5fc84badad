"""How the layers of a LoKr are split, and the factor that has a trainer split them so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from impasto.formats.names import kernel

#: (o1, i1) and (o2, i2), the sides of w1 and w2
Split = tuple[tuple[int, int], tuple[int, int]]


def split_of(layer: str, parts: Mapping[str, Tensor]) -> Split:
    """How a layer is split, from its parts (see `formats.parts`)."""
    def side(name: str, axis: int) -> int:
        return parts[f"lokr.{name}"].shape[axis]

    first = (side("w1", 0), side("w1", 1)) if "lokr.w1" in parts else (side("w1_a", 0), side("w1_b", 1))
    if "lokr.w2" in parts:
        return first, (side("w2", 0), side("w2", 1))
    if "lokr.t2" in parts:
        return first, (side("w2_a", 1), side("w2_b", 1))
    return first, (side("w2_a", 0), side("w2_b", 1) // math.prod(kernel(layer)))


def factor_of(splits: Iterable[Split], factorization: Callable[[int, int], tuple[int, int]]) -> int | None:
    """The factor by which `factorization` splits all layers like this, -1 first; None if there is none."""
    sizes = {(first, second) for one, two in splits for first, second in zip(one, two, strict=True)}
    candidates = [-1, *sorted({side for size in sizes for side in size})]
    return next((factor for factor in candidates
                 if all(factorization(first * second, factor) == (first, second) for first, second in sizes)), None)
