"""Aspect-ratio buckets: each picture is cut to one of a few shapes of about the same area.

Sizes are (height, width) in pixels throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from impasto.core.errors import UserError
from impasto.data.dataset import Size
from impasto.data.options import DataOptions

if TYPE_CHECKING:  # geometry asks for no torch
    from torch import Tensor

#: no picture is enlarged more than this: what it would teach is blur
MOST_ENLARGED = 4.0


@dataclass(frozen=True)
class Placement:
    """How a picture is cut: scaled to `resized`, then the window of size `bucket` at `crop` (top, left)."""

    original: Size
    resized: Size
    crop: Size
    bucket: Size

    @property
    def scale(self) -> float:
        """Enlargement (above 1) or reduction (below 1) of the shorter-fitting side."""
        return max(b / o for b, o in zip(self.bucket, self.original, strict=True))

    @property
    def cropped(self) -> float:
        """The fraction of the picture's area that is cut off."""
        return cropped_fraction(self.original, self.bucket)

    @property
    def window(self) -> tuple[float, float, float, float]:
        """What is kept of the picture: left, top, right and bottom edge, as fractions of its width and height."""
        (top, left), (height, width), (tall, wide) = self.crop, self.bucket, self.resized
        return left / wide, top / tall, (left + width) / wide, (top + height) / tall

    def flipped(self) -> Placement:
        """Of the mirrored picture: the window's left edge is now what its right edge was."""
        left = self.resized[1] - self.crop[1] - self.bucket[1]
        return Placement(self.original, self.resized, (self.crop[0], left), self.bucket)


def cropped_fraction(size: Size, bucket: Size) -> float:
    """Area lost when a picture of `size` is scaled to cover `bucket` and cut to it, as a fraction."""
    wide, tall = size[1] * bucket[0], size[0] * bucket[1]
    return 1 - min(wide, tall) / max(wide, tall)


def bucket_sizes(options: DataOptions) -> list[Size]:
    """All buckets, sorted: for each side the longest other side within the area resolution².

    Sides are multiples of `bucket_step` within [bucket_min, bucket_max] (kohya's and NovelAI's scheme).
    """
    if not options.buckets:
        return [(options.resolution, options.resolution)]
    step, area = options.bucket_step, options.resolution**2
    sizes: set[Size] = set()
    for side in range(-(-options.shortest // step) * step, options.longest + 1, step):
        other = min(area // side, options.longest) // step * step
        if other >= options.shortest:
            sizes |= {(side, other), (other, side)}
    square = options.resolution // step * step
    if square >= options.shortest:
        sizes.add((square, square))
    return sorted(sizes)


def all_buckets(options: DataOptions) -> list[Size]:
    """The buckets of all resolutions, sorted."""
    return sorted({size for one in options.by_resolution for size in bucket_sizes(one)})


def cuts(size: Size, sized: Sequence[tuple[DataOptions, list[Size]]]) -> list[Placement]:
    """How a picture is cut at each of its resolutions, from the smallest on; none where it is too small for any.

    `sized` are the options of each resolution and their buckets. Where it would be enlarged it is not used, but at the
    smallest one, and nowhere twice in one bucket.
    """
    found = [placement for one, buckets in sized if (placement := place(size, one, buckets)) is not None]
    large = [placement for placement in found if placement.scale <= 1] or found[:1]
    return list({placement.bucket: placement for placement in large}.values())


def place(size: Size, options: DataOptions, buckets: list[Size]) -> Placement | None:
    """The bucket that crops least, and among equals enlarges least; None where the picture is too small.

    With `upscale = "never"` only buckets that fit inside the picture count; where none does, the picture's
    own size, cut to multiples of the step (a square without buckets), is its bucket.
    """
    if options.upscale == "never":
        buckets = [b for b in buckets if b[0] <= size[0] and b[1] <= size[1]] or _own_bucket(size, options)
    if not buckets:
        return None
    best = min(buckets, key=lambda b: (cropped_fraction(size, b), max(b[0] / size[0], b[1] / size[1]), b))
    scale = max(best[0] / size[0], best[1] / size[1])
    if scale > MOST_ENLARGED:
        return None
    resized = (max(best[0], round(size[0] * scale)), max(best[1], round(size[1] * scale)))
    crop = ((resized[0] - best[0]) // 2, (resized[1] - best[1]) // 2)
    return Placement(size, resized, crop, best)


def _own_bucket(size: Size, options: DataOptions) -> list[Size]:
    step = options.bucket_step
    height, width = (min(side, options.longest) // step * step for side in size)
    if not options.buckets:
        height = width = min(height, width)
    while height * width > options.resolution**2:  # long and thin: too slim for any bucket, yet a full area
        height, width = (height - step, width) if height >= width else (height, width - step)
    return [(height, width)] if height and width else []


def too_small(size: Size, options: DataOptions) -> str:
    """Why a picture that has no place has none."""
    why = "smaller than the smallest bucket" if options.upscale == "never" else \
        f"it would have to be enlarged more than {MOST_ENLARGED:g} times"
    return f"is too small ({size[1]}x{size[0]} pixels): {why}"


def check_sizes(options: DataOptions, cell: int, name: str = "data") -> None:
    """Raise a `UserError` for sizes that a base whose latent cells (patches) have sides of `cell` pixels cannot have.

    `name` is what the set is called: "data", or "data.1" of several.
    """
    key = "resolution" if options.resolutions is None else "resolutions"
    sides = [("bucket_step", options.bucket_step)]
    sides += [] if options.buckets else [(key, one.resolution) for one in options.by_resolution]
    for key, side in sides:
        if side % cell:
            raise UserError(f"{side} is not a multiple of {cell} pixels, the side of this base's latent cells",
                            where=f"{name}.{key}",
                            fix=f"use {max(side // cell, 1) * cell} or {-(-side // cell) * cell}")
    for one in options.by_resolution:
        if not bucket_sizes(one):
            raise UserError(f"no bucket has sides that are multiples of {one.bucket_step} from {one.shortest} "
                            f"to {one.longest} and an area up to {one.resolution}x{one.resolution}",
                            where=name, fix=f"lower {name}.bucket_min or {name}.bucket_step")


def cut(image: Image.Image, placement: Placement, flip: bool = False) -> Tensor:
    """The picture as its bucket shows it: (3, H, W), fp32 in [-1, 1]. Lanczos, centre crop, then mirrored."""
    height, width = placement.resized
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    (top, left), (height, width) = placement.crop, placement.bucket
    image = image.crop((left, top, left + width, top + height))
    return to_tensor(image, flip)


def to_tensor(image: Image.Image, flip: bool = False) -> Tensor:
    """A picture as numbers, (3, H, W), fp32 in [-1, 1]; mirrored if asked for."""
    import torch

    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
