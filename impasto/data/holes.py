"""Holes in pictures, which a base for inpainting learns to fill: random ones, or a picture's own mask.

A random hole is a function of what is shown of the picture and its number alone. Of four about one is the whole
picture, without which the base would unlearn to draw from words alone (RunwayML's share); the others are rectangles and
ellipses (as in diffusers' DreamBooth for inpainting), or brush strokes (as LaMa's: Suvorov et al. 2022), one or a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from impasto.core.rng import seed_for
from impasto.data.augment import Variant
from impasto.data.dataset import Size

if TYPE_CHECKING:
    from impasto.data.items import Item

#: raise it when random holes are drawn in another way
HOLES = 1

#: share of holes that are the whole picture
WHOLE = 0.25

#: a picture is drawn anew where its mask is at least so light
LIGHT = 128


def random_hole(size: Size, *key: int | str, whole: float = WHOLE) -> Image.Image:
    """A hole in a picture of (height, width): 255 where it is to be drawn anew, else 0. A function of its key.

    `whole`: the share of such that are the whole picture.
    """

    def draw(use: str) -> float:
        """In [0, 1)."""
        return seed_for("hole", *key, use) / 2**63

    height, width = size
    if draw("whole") < whole:
        return Image.new("L", (width, height), 255)
    hole = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(hole)
    strokes = draw("kind") < 0.5
    for i in range(1 + int(draw("count") * 3)):
        if strokes:
            _stroke(pen, size, lambda use, i=i: draw(f"{i} {use}"))
        else:
            _shape(pen, size, lambda use, i=i: draw(f"{i} {use}"))
    return hole


def _shape(pen: ImageDraw.ImageDraw, size: Size, draw: Callable[[str], float]) -> None:
    """A rectangle or an ellipse of an eighth to seven eighths of each side, anywhere inside the picture."""
    sides = [side * (1 + 6 * draw(use)) / 8 for side, use in zip(size, ("tall", "wide"), strict=True)]
    top, left = ((side - own) * draw(use) for side, own, use in zip(size, sides, ("top", "left"), strict=True))
    box = (round(left), round(top), round(left + sides[1]), round(top + sides[0]))
    (pen.ellipse if draw("round") < 0.5 else pen.rectangle)(box, fill=255)


def _stroke(pen: ImageDraw.ImageDraw, size: Size, draw: Callable[[str], float]) -> None:
    """A line with a few bends, about a tenth of the picture thick, from anywhere inside it."""
    height, width = size
    thick = max(round(min(size) * (0.05 + 0.15 * draw("thick"))), 1)
    x, y, angle = draw("x") * width, draw("y") * height, draw("angle") * math.tau
    for i in range(2 + int(draw("bends") * 5)):
        angle += (draw(f"turn {i}") - 0.5) * math.pi
        length = min(size) * (0.1 + 0.4 * draw(f"length {i}"))
        before, x, y = (x, y), min(max(x + length * math.cos(angle), 0), width), min(
            max(y + length * math.sin(angle), 0), height)
        pen.line((before, (x, y)), fill=255, width=thick)
        pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)


def hole_facts(item: Item, number: int) -> list[object]:
    """What a hole depends on beside what is shown of the picture, for keys."""
    if not item.handling.hole_of_mask:
        return ["random", HOLES, number]
    return ["whole"] if item.mask is None else ["mask", item.mask.digest, item.mask.alpha]


def hole(item: Item, variant: Variant, flip: bool, number: int) -> np.ndarray:
    """Where that variant of a picture is to be drawn anew, (H, W), True or False; mirrored with it.

    A picture without a mask of its own, where holes are masks, is drawn anew as a whole.
    """
    size, placement = variant.placement.bucket, variant.placement
    if not item.handling.hole_of_mask:
        image = random_hole(size, item.picture.digest, *placement.resized, *placement.crop, *size, str(variant.facts),
                            number)
    else:
        image = Image.new("L", (size[1], size[0]), 255) if item.mask is None else variant.window(item.mask.read())
    found = np.asarray(image) >= LIGHT
    return found[:, ::-1] if flip else found
