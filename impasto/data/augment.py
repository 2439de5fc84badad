"""Chance in how a picture is shown: where it is cut, how it is turned and enlarged, and its colours.

A picture has a few variants (`data.variants`), each a function of its content and the variant's number alone: so they
are encoded once, as mirrored pictures are, and are the same in every run. What is shown of the picture is where its
placement says, and the crop conditioning with it: of a turned window, that of the upright one around the same middle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance

from impasto.core.rng import seed_for
from impasto.data.buckets import Placement, cut, to_tensor
from impasto.data.options import DataOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """One way to show a picture."""

    placement: Placement
    angle: float = 0.0  # degrees, counter-clockwise, around the middle of the window
    brightness: float = 1.0  # factors, as of Pillow's ImageEnhance
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # turns of the colour circle

    @property
    def facts(self) -> list[tuple[str, float]]:
        """What a placement does not tell, for keys; nothing of a picture that is cut and no more."""
        told = {name: getattr(self, name) for name in ("angle", "brightness", "contrast", "saturation", "hue")}
        return [(name, value) for name, value in told.items() if value != getattr(Variant, name)]

    def show(self, image: Image.Image, flip: bool = False) -> Tensor:
        """The picture as this variant shows it: (3, H, W), fp32 in [-1, 1]; mirrored at last."""
        if not self.facts:
            return cut(image, self.placement, flip)
        window = self.window(image)
        for enhancer, factor in ((ImageEnhance.Brightness, self.brightness), (ImageEnhance.Contrast, self.contrast),
                                 (ImageEnhance.Color, self.saturation)):
            if factor != 1:
                window = enhancer(window).enhance(factor)
        if self.hue:
            window = shifted(window, self.hue)
        return to_tensor(window, flip)

    def window(self, image: Image.Image) -> Image.Image:
        """What is in the window, turned; of a picture of any mode, whose colours stay as they are."""
        (tall, wide), (top, left), (height, width) = (self.placement.resized, self.placement.crop,
                                                      self.placement.bucket)
        if image.size != (wide, tall):
            image = image.resize((wide, tall), Image.Resampling.LANCZOS)
        if not self.angle:
            return image.crop((left, top, left + width, top + height))
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        # a place (x, y) of the window lies, from the middle, where turning it back puts it (y points down)
        middle = left + width / 2, top + height / 2
        back = (cos, -sin, middle[0] - cos * width / 2 + sin * height / 2,
                sin, cos, middle[1] - sin * width / 2 - cos * height / 2)
        return image.transform((width, height), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Augment:
    """The keys of `[data]` that leave something about a picture to chance."""

    random_crop: bool = False
    zoom: float = 0.0
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    variants: int = 1

    @classmethod
    def of(cls, data: DataOptions) -> Augment:
        """What a set asks for; without chance there is one variant."""
        asked = cls(data.random_crop, data.zoom, data.rotate, data.brightness, data.contrast, data.saturation, data.hue)
        return replace(asked, variants=data.variants) if asked != cls() else asked

    @property
    def facts(self) -> list[tuple[str, object]]:
        """What is not as without any chance, for fingerprints."""
        return [] if self == Augment() else sorted(vars(self).items())

    def variant(self, placement: Placement, digest: str, number: int) -> Variant:
        """Variant `number`, from 0, of the picture with that digest, which would be cut as `placement` says."""
        if self == Augment():
            return Variant(placement)

        def draw(use: str) -> float:
            """In [-1, 1)."""
            return seed_for("variant", digest, number, use) / 2**62 - 1

        angle = self.rotate * draw("rotate")
        return Variant(self._placed(placement, angle, (draw("zoom") + 1) / 2, draw("top"), draw("left")), angle,
                       1 + self.brightness * draw("brightness"), 1 + self.contrast * draw("contrast"),
                       1 + self.saturation * draw("saturation"), self.hue * draw("hue"))

    def _placed(self, placement: Placement, angle: float, enlarged: float, down: float, right: float) -> Placement:
        """The cut of a variant: large enough that the turned window lies inside the picture."""
        (height, width), (tall, wide) = placement.bucket, placement.resized
        cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
        # sides of the box around the window, upright and turned
        box = max(height, height * cos + width * sin), max(width, width * cos + height * sin)
        margin = 1 if angle else 0  # the middle may lie half a pixel beside the picture's
        scale = max(1 + self.zoom * enlarged, (box[0] + margin) / tall, (box[1] + margin) / wide)
        resized = placement.resized if scale == 1 else (math.ceil(tall * scale), math.ceil(wide * scale))
        crop = [_at(side, window, round_it, where if self.random_crop else None) for side, window, round_it, where
                in zip(resized, placement.bucket, box, (down, right), strict=True)]
        return Placement(placement.original, resized, (crop[0], crop[1]), placement.bucket)


def _at(side: int, window: int, box: float, where: float | None) -> int:
    """Where a window begins along a side, so that the box around its middle lies inside; `where` in [-1, 1), or in the
    middle."""
    if where is None:
        return (side - window) // 2
    least, most = math.ceil((box - window) / 2), math.floor(side - (box + window) / 2)
    return least + min(int((where + 1) / 2 * (most - least + 1)), most - least)


def shifted(image: Image.Image, turns: float) -> Image.Image:
    """The picture with all hues shifted by that part of the colour circle (torchvision's adjust_hue)."""
    hue, saturation, value = image.convert("HSV").split()
    moved = (np.asarray(hue).astype(np.int64) + round(turns * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), saturation, value)).convert("RGB")
