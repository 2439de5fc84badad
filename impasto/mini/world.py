"""A world that a program draws, so that the truth about every picture is known.

    "a small red striped star on the left, on a blue background"
    "a green ring above a pink heart, on a white background"

A `Scene` is that truth; `draw` makes its picture, of any size and antialiased; `caption` says it in words. All is a
function of seeds. What is usual (medium size, in the middle, plain, filled) is not said, as people don't say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from impasto.core.rng import seed_for
from impasto.mini.shapes import ACCENTS, SHAPES, Thing

#: raise it when the same seed gives another picture or caption
VERSION = 1

#: objects and backgrounds share their colours' names; a background is a little paler or deeper than an object
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (217, 38, 38), "orange": (245, 133, 26), "yellow": (250, 214, 41), "green": (36, 156, 66),
    "blue": (33, 82, 214), "purple": (128, 46, 178), "pink": (250, 138, 189), "brown": (122, 74, 38),
    "black": (23, 23, 26), "white": (245, 245, 242),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
POSITIONS = {"middle": (0.0, 0.0), "left": (-0.4, 0.0), "right": (0.4, 0.0), "top": (0.0, -0.4), "bottom": (0.0, 0.4)}
SIZES = {"small": 0.4, "medium": 0.52, "large": 0.66}  # half of an object's height, of half the picture's
STYLES = ("filled", "outlined", "pixelated", "glossy")
PAIRED = 0.38  # half height of each of two objects
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

#: one colour of each shape, and one background of each colour, are kept from training
HELD_OUT_SHAPES = {shape: list(COLOURS)[(3 * i + 2) % len(COLOURS)] for i, shape in enumerate(SHAPES)}
HELD_OUT_BACKGROUNDS = {colour: list(COLOURS)[(i + 4) % len(COLOURS)] for i, colour in enumerate(COLOURS)}

#: pixels are drawn so many times finer and then averaged
_FINER = 4


@dataclass(frozen=True)
class Object:
    """One thing in a scene."""

    shape: str
    colour: str
    accent: str = ""  # the second colour, of shapes that have one
    texture: str = "plain"
    size: str = "medium"
    position: str = "middle"  # of a single object


@dataclass(frozen=True)
class Scene:
    """The truth about a picture: one object, or two in a relation, on a background, in a style."""

    objects: tuple[Object, ...]
    background: str
    style: str = "filled"
    relation: str = ""

    @property
    def held_out(self) -> bool:
        """Whether it has a combination that training never shows."""
        return any(HELD_OUT_SHAPES.get(o.shape) == o.colour or HELD_OUT_BACKGROUNDS[o.colour] == self.background
                   for o in self.objects)


# --- scenes ------------------------------------------------------------------------------------------------------


def numbers(*key: int | str) -> np.random.Generator:
    """The generator of random numbers of that key."""
    return np.random.default_rng(seed_for("world", *key))


def scene(seed: int, *, pairs: float = 0.2, held_out: bool = False) -> Scene:
    """A random scene; two objects with probability `pairs`. Training's combinations only, or held-out ones only."""
    rng = numbers("scene", seed)
    two = rng.random() < pairs
    while True:
        found = _pair(rng) if two else _single(rng)
        if found.held_out == held_out:
            return found


def _single(rng: np.random.Generator) -> Scene:
    shape, background, colour, accent = pick(rng, SHAPES), *_different(rng, 3)
    style = pick(rng, STYLES, [0.52, 0.16, 0.16, 0.16])
    bare = style in ("outlined", "pixelated")  # nothing is left of a texture there
    thing = Object(shape, colour, accent if shape in ACCENTS else "",
                   texture="plain" if bare else pick(rng, TEXTURES, [0.34, 0.22, 0.22, 0.22]),
                   size=pick(rng, SIZES, [0.25, 0.45, 0.3]),
                   position=pick(rng, POSITIONS, [0.4, 0.15, 0.15, 0.15, 0.15]))
    return Scene((thing,), background, style)


def _pair(rng: np.random.Generator) -> Scene:
    background, one, other = _different(rng, 3)
    simple = [shape for shape in SHAPES if shape not in ACCENTS]
    objects = tuple(Object(pick(rng, simple), colour) for colour in (one, other))
    return Scene(objects, background, relation=pick(rng, RELATIONS))


def pick(rng: np.random.Generator, choices: Sequence[str] | dict, chances: Sequence[float] | None = None) -> str:
    """One of the choices, all alike or with these chances."""
    names = list(choices)
    return names[int(rng.choice(len(names), p=chances))]


def _different(rng: np.random.Generator, count: int) -> list[str]:
    """So many colours, no two of them the same."""
    return [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count]]


# --- captions ----------------------------------------------------------------------------------------------------


def caption(scene: Scene, seed: int | None = None) -> str:
    """The scene in words, exactly; in one of several wordings by `seed`, or in the plainest."""
    wording = 0 if seed is None else int(numbers("caption", seed).integers(6))
    ground = f"{an(scene.background)} background"
    style = "" if scene.style == "filled" else scene.style
    first = scene.objects[0]
    if scene.relation:
        what = f"{_name(first)} {scene.relation} {_name(scene.objects[1])}"
    else:
        what = _name(first, style)
        if first.position != "middle":
            place = f"at the {first.position}" if first.position in ("top", "bottom") else f"on the {first.position}"
            what = f"{what} {place}"
    return (f"{what}, on {ground}", f"{what} on {ground}", f"{ground} with {what}", f"a picture of {what}, on {ground}",
            f"{what}, {scene.background} background", f"{what}, on {ground}")[wording]


def _name(thing: Object, style: str = "") -> str:
    size = "" if thing.size == "medium" else thing.size
    texture = "" if thing.texture == "plain" else thing.texture
    words = " ".join(word for word in (style, size, thing.colour, texture, thing.shape) if word)
    return an(words) + (f" with {an(thing.accent)} {ACCENTS[thing.shape]}" if thing.accent else "")


def an(words: str) -> str:
    """The words with their article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# --- pictures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """Where a thing stands: centre and half height in half sides of the picture, turned by radians."""

    x: float
    y: float
    half: float
    turn: float = 0.0


@dataclass(frozen=True)
class Look:
    """How a thing is painted: colours in 0 … 1, a texture of TEXTURES, a style of STYLES or a taught one."""

    colour: np.ndarray
    accent: np.ndarray
    texture: str = "plain"
    style: str = "filled"


def draw(scene: Scene, side: int, seed: int) -> Image.Image:
    """The scene's picture, side x side pixels; `seed` varies what the caption does not say."""
    rng = numbers("draw", seed)
    canvas = ground(scene.background, side, rng)
    for thing, pose in zip(scene.objects, _poses(scene, rng), strict=True):
        look = Look(tint(thing.colour, rng), tint(thing.accent or thing.colour, rng), thing.texture, scene.style)
        paint(canvas, SHAPES[thing.shape], pose, look)
    return finish(canvas, scene.style)


def _poses(scene: Scene, rng: np.random.Generator) -> list[Pose]:
    poses = []
    for i, thing in enumerate(scene.objects):
        half = (PAIRED if scene.relation else SIZES[thing.size]) * rng.uniform(0.94, 1.06)
        if scene.relation:
            direction = np.array(RELATIONS[scene.relation]) * (0.46 if i == 0 else -0.46)
        else:
            direction = np.clip(np.array(POSITIONS[thing.position]), half - 0.98, 0.98 - half)
        x, y = direction + rng.uniform(-0.05, 0.05, 2)
        poses.append(Pose(x, y, half, rng.uniform(-0.12, 0.12)))
    return poses


def tint(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A colour's shade of this picture, RGB in 0 … 1."""
    return np.clip(np.array(COLOURS[colour]) / 255 + rng.uniform(-0.035, 0.035, 3), 0, 1).astype(np.float32)


def ground(colour: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """A background (side, side, 3) in 0 … 1: the colour, a little muted, getting lighter in some direction."""
    muted = 0.86 * tint(colour, rng) + 0.14 * 0.5
    x, y = grid(side)
    turn, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.12)
    light = 1 + depth * (np.cos(turn) * x + np.sin(turn) * y)
    return np.clip(muted * light[..., None], 0, 1).astype(np.float32)


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x and y of the pixels' middles, (side, side), in [-1, 1]."""
    line = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    return np.broadcast_to(line, (side, side)), np.broadcast_to(line[:, None], (side, side))


def paint(canvas: np.ndarray, thing: Thing, pose: Pose, look: Look) -> None:
    """Paint a thing onto a canvas (side, side, 3) in 0 … 1, in place."""
    behind = canvas.copy()
    for part in thing:
        area = coverage(part.outline, pose, len(canvas), 0.13 if look.style == "outlined" else None)[..., None]
        if part.paint == "hole" and look.style != "outlined":
            canvas += area * (behind - canvas)
            continue
        tone = look.accent if part.paint == "accent" else look.colour
        skin = textured(tone, look.texture if part.paint == "colour" else "plain", len(canvas))
        if look.style == "glossy":
            skin = _glossy(skin, pose, len(canvas))
        canvas += area * (skin - canvas)


def coverage(outline: np.ndarray, pose: Pose, side: int, line: float | None = None) -> np.ndarray:
    """How much of each pixel an outline covers, (side, side) in 0 … 1: its inside, or a line along it.

    `line` is the line's width, in half heights of the thing.
    """
    c, s = np.cos(pose.turn), np.sin(pose.turn)
    turned = outline @ np.array([[c, s], [-s, c]])
    fine = side * _FINER
    points = [tuple(p) for p in ((turned * pose.half + (pose.x, pose.y) + 1) * fine / 2 - 0.5)]
    mask = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(mask)
    if line is None:
        pen.polygon(points, fill=255)
    else:
        pen.line([*points, points[0], points[1]], fill=255, width=round(line * pose.half * fine / 2), joint="curve")
    return np.asarray(mask.reduce(_FINER), dtype=np.float32) / 255


def textured(tone: np.ndarray, texture: str, side: int) -> np.ndarray:
    """A colour, or two tones of it in a pattern that is large enough to be seen: (3,) or (side, side, 3)."""
    if texture == "plain":
        return tone
    x, y = grid(side)
    sharp = side * 0.07  # edges of the pattern, about two pixels soft
    if texture == "striped":
        wave = np.sin((x + y) * np.pi / 0.19)
    elif texture == "checkered":
        wave = np.sin(x * np.pi / 0.2) * np.sin(y * np.pi / 0.2) * 1.5
    else:
        wave = (np.cos(x * 2 * np.pi / 0.31) + np.cos(y * 2 * np.pi / 0.31)) - 0.75
    share = np.clip(wave * sharp / 4 + 0.5, 0, 1)[..., None]
    other = tone * 0.4 if tone @ np.array([0.3, 0.59, 0.11]) > 0.5 else tone * 0.4 + 0.6
    return (tone + share * (other - tone)).astype(np.float32)


def _glossy(skin: np.ndarray, pose: Pose, side: int) -> np.ndarray:
    """Lit from the upper left: a highlight, and darker towards the lower right."""
    x, y = grid(side)
    u, v = (x - pose.x) / pose.half, (y - pose.y) / pose.half
    shade = np.clip(0.95 - 0.3 * (u + v), 0.35, 1.15)[..., None]
    light = np.exp(-((u + 0.32) ** 2 + (v + 0.36) ** 2) / 0.07)[..., None]
    return np.clip(skin * shade + light * (0.9 - 0.4 * skin), 0, 1)


def finish(canvas: np.ndarray, style: str) -> Image.Image:
    """The picture on a canvas, after what a style does to the whole of it."""
    picture = Image.fromarray((canvas * 255 + 0.5).astype(np.uint8))
    if style == "pixelated":
        side, cells, nearest = picture.width, 32, Image.Resampling.NEAREST
        picture = picture.resize((cells, cells), nearest).resize((side, side), nearest)
    return picture


def doodle(side: int, seed: int) -> Image.Image:
    """A picture of nothing in particular: outlines, lines and patches in any colours. It keeps a VAE general."""
    rng = numbers("doodle", seed)
    canvas = ground(pick(rng, COLOURS), side, rng) * 0.7 + 0.3 * rng.random(3).astype(np.float32)
    for _ in range(int(rng.integers(2, 7))):
        count = int(rng.integers(3, 9))
        angles = np.sort(rng.uniform(0, 2 * np.pi, count))
        radii = rng.uniform(0.35, 1.0, count)
        outline = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
        if rng.random() < 0.4:
            from_shapes = SHAPES[pick(rng, SHAPES)]
            outline = from_shapes[int(rng.integers(len(from_shapes)))].outline
        pose = Pose(rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8), rng.uniform(0.12, 0.75),
                    rng.uniform(0, 2 * np.pi))
        look = Look(rng.random(3).astype(np.float32), rng.random(3).astype(np.float32), pick(rng, TEXTURES),
                    pick(rng, STYLES))
        line = rng.uniform(0.08, 0.25) if rng.random() < 0.3 else None
        area = coverage(outline, pose, side, line)[..., None]
        canvas += area * (textured(look.colour, look.texture, side) - canvas)
    return finish(np.clip(canvas, 0, 1), pick(rng, STYLES))
