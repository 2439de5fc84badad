"""Sizes, shapes and cuts of many pictures in a few numbers."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from impasto.data.dataset import Size

#: width to height of the shapes that pictures are counted as
RATIOS = {"1:3": 1 / 3, "1:2": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "4:5": 4 / 5, "1:1": 1.0,
          "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0, "3:1": 3.0}
#: shorter sides in pixels between which pictures are counted
SIDES = (128, 256, 512, 768, 1024, 1536, 2048, 4096)
_SIDE_NAMES = [f"under {SIDES[0]}", *(f"{low} to {high - 1}" for low, high in itertools.pairwise(SIDES)),
               f"{SIDES[-1]} and more"]


@dataclass(frozen=True)
class Shapes:
    """Sizes, shapes and cuts of all pictures that can be decoded."""

    buckets: dict[Size, int]  # the fullest first
    orientations: dict[str, int]
    ratios: dict[str, int]  # the nearest of RATIOS, from tall to wide
    sides: dict[str, int]  # shorter side in pixels, between SIDES, from small to large
    smallest: Size | None
    middle: Size | None  # by area
    largest: Size | None
    cropped_mean: float
    cropped_most: tuple[float, str] | None
    enlarged: int
    enlarged_most: tuple[float, str] | None


def shapes_of(sizes: Mapping[Size, int], buckets: Mapping[Size, int], cropped: np.ndarray, scale: np.ndarray,
              name: Callable[[int], str]) -> Shapes:
    """`sizes`: how many pictures there are of each; `buckets`: of each bucket.

    `cropped` and `scale`, (N,), are the shares of area cut off and the enlargements of the pictures that have a place,
    `name(i)` what the i-th of them is called.
    """
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    sums = list(itertools.accumulate(sizes[size] for size in ordered))
    return Shapes(
        buckets=dict(sorted(buckets.items(), key=lambda pair: (-pair[1], pair[0]))),
        orientations=dict(_counted(orientation, sizes).most_common()),
        ratios=_histogram(RATIOS, _counted(_ratio, sizes)),
        sides=_histogram(_SIDE_NAMES, _counted(lambda size: _SIDE_NAMES[bisect.bisect(SIDES, min(size))], sizes)),
        smallest=ordered[0] if ordered else None,
        middle=ordered[bisect.bisect(sums, sums[-1] // 2)] if ordered else None,
        largest=ordered[-1] if ordered else None,
        cropped_mean=float(cropped.mean()) if len(cropped) else 0.0,
        cropped_most=(float(cropped.max()), name(int(cropped.argmax()))) if len(cropped) else None,
        enlarged=int((scale > 1).sum()),
        enlarged_most=(float(scale.max()), name(int(scale.argmax()))) if (scale > 1).any() else None)


def orientation(size: Size) -> str:
    """The shape of a picture in a word: square is within a twentieth."""
    height, width = size
    return "square" if 0.95 <= width / height <= 1 / 0.95 else "landscape" if width > height else "portrait"


def _ratio(size: Size) -> str:
    """The name of the nearest shape."""
    height, width = size
    return min(RATIOS, key=lambda name: abs(math.log(width / height / RATIOS[name])))


def _counted(kind: Callable[[Size], str], sizes: Mapping[Size, int]) -> Counter[str]:
    counts = Counter[str]()
    for size, count in sizes.items():
        counts[kind(size)] += count
    return counts


def _histogram(order: Iterable[str], counts: Mapping[str, int]) -> dict[str, int]:
    """In that order, without what does not occur."""
    return {name: counts[name] for name in order if name in counts}
