"""Things that can be drawn, as outlines: polygons in a unit square, x to the right and y down, both in [-1, 1].

A thing is a few parts in the order of drawing. Each part says which of the thing's two colours it takes; a part
that is a hole shows what lies behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Outline = np.ndarray  # (N, 2)


@dataclass(frozen=True)
class Part:
    """One closed outline of a thing, filled."""

    outline: Outline
    paint: Literal["colour", "accent", "hole"] = "colour"


Thing = tuple[Part, ...]


# --- outlines --------------------------------------------------------------------------------------------------


def ellipse(x: float, y: float, a: float, b: float | None = None, turn: float = 0.0, points: int = 48) -> Outline:
    """An ellipse about (x, y) with half axes a and b, turned by `turn` radians."""
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    px, py = a * np.cos(t), (a if b is None else b) * np.sin(t)
    return np.stack([x + px * np.cos(turn) - py * np.sin(turn), y + px * np.sin(turn) + py * np.cos(turn)], 1)


def polygon(*corners: tuple[float, float]) -> Outline:
    """The polygon with these corners."""
    return np.array(corners, dtype=float)


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """An upright rectangle."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _star(points: int = 5, inner: float = 0.42) -> Outline:
    t = np.arange(2 * points) * np.pi / points - np.pi / 2
    r = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([r * np.cos(t), r * np.sin(t) + 0.05], 1)


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, -y / 17 - 0.1], 1)


def _moon() -> Outline:
    outer = np.linspace(0.28 * np.pi, 1.72 * np.pi, 40)
    inner = np.linspace(1.60 * np.pi, 0.40 * np.pi, 40)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1) + [0.1, 0],
                           np.stack([0.45 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)], 1) + [0.1, 0]])


def _cross(arm: float = 0.33) -> Outline:
    a = arm
    return polygon((-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a),
                   (-a, -a))


def _petals(petals: int = 6) -> Outline:
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    r = 0.74 + 0.26 * np.cos(petals * t)
    return np.stack([r * np.cos(t), r * np.sin(t)], 1)


def _half_disc(y: float, a: float, b: float) -> Outline:
    """The upper half of an ellipse that stands on height y."""
    t = np.linspace(np.pi, 2 * np.pi, 40)
    return np.stack([a * np.cos(t), y + b * np.sin(t)], 1)


#: what the world knows, by the word for it; those of two colours, with the word for the second one's part
SHAPES: dict[str, Thing] = {
    "circle": (Part(ellipse(0, 0, 0.92)),),
    "square": (Part(box(-0.84, -0.84, 0.84, 0.84)),),
    "triangle": (Part(polygon((0, -0.95), (0.98, 0.8), (-0.98, 0.8))),),
    "star": (Part(_star()),),
    "heart": (Part(_heart()),),
    "ring": (Part(ellipse(0, 0, 0.95)), Part(ellipse(0, 0, 0.5), "hole")),
    "cross": (Part(_cross()),),
    "moon": (Part(_moon()),),
    "diamond": (Part(polygon((0, -1), (0.68, 0), (0, 1), (-0.68, 0))),),
    "arrow": (Part(polygon((-0.95, -0.32), (0.1, -0.32), (0.1, -0.8), (0.98, 0), (0.1, 0.8), (0.1, 0.32),
                           (-0.95, 0.32))),),
    "house": (Part(box(-0.72, -0.15, 0.72, 0.95)), Part(polygon((0, -1), (1, -0.1), (-1, -0.1)), "accent")),
    "tree": (Part(box(-0.2, 0.2, 0.2, 1), "accent"),
             Part(polygon((0, -1), (0.82, 0.42), (-0.82, 0.42)))),
    "flower": (Part(_petals()), Part(ellipse(0, 0, 0.36), "accent")),
    "fish": (Part(polygon((0.3, 0), (0.98, -0.66), (0.98, 0.66)), "accent"), Part(ellipse(-0.2, 0, 0.78, 0.56))),
    "mushroom": (Part(box(-0.3, -0.05, 0.3, 0.95), "accent"), Part(_half_disc(0.12, 0.98, 1.02))),
    "boat": (Part(polygon((0.02, -1), (0.82, 0.22), (0.02, 0.22)), "accent"),
             Part(polygon((-0.98, 0.34), (0.98, 0.34), (0.6, 0.92), (-0.6, 0.92)))),
}

#: the part that takes the second colour
ACCENTS = {"house": "roof", "tree": "trunk", "flower": "centre", "fish": "tail", "mushroom": "stem", "boat": "sail"}
