"""What the embedded base can be taught: a mascot and a style that it does not know, and a name for what it can draw;
and the pictures to teach them with.

`data.folder = "mini:mascot"`, `"mini:style"` and `"mini:familiar"` are folders of such pictures, drawn when they are
first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from impasto.core.errors import UserError, nearest
from impasto.core.files import atomic_folder, cache_dir, locked
from impasto.mini import world
from impasto.mini.shapes import SHAPES, Part, ellipse
from impasto.mini.world import Look, Object, Pose, Scene

#: raise it when the pictures change
VERSION = 2

#: a rabbit's head of teal and cream: its shape and its first colour are none of the world's
MASCOT = (
    Part(ellipse(-0.36, -0.56, 0.2, 0.48, -0.22)), Part(ellipse(0.36, -0.56, 0.2, 0.48, 0.22)),
    Part(ellipse(0, 0.32, 0.76, 0.66)), Part(ellipse(0, 0.52, 0.44, 0.36), "accent"),
)
TEAL, CREAM = np.array([0.05, 0.66, 0.64], np.float32), np.array([0.99, 0.91, 0.74], np.float32)

#: what the mascot is called in captions, and its class
MASCOT_NAME, MASCOT_CLASS = "sks mascot", "mascot"
#: backgrounds of the pictures that teach the mascot, and those on which it is then asked for
TAUGHT_ON = ("blue", "yellow", "green", "brown", "black", "white")
ASKED_ON = ("purple", "pink", "orange", "red")

#: words for the style in captions
STYLE_NAME = "sks style"

#: a thing that the base can draw well, under a name that tells nothing of it
FAMILIAR, FAMILIAR_NAME = Object("heart", "purple", texture="striped"), "sks thing"
FAMILIAR_TAUGHT_ON = ("blue", "yellow", "green", "brown", "black")
FAMILIAR_ASKED_ON = ("pink", "orange", "red")


def mascot(background: str, side: int, seed: int, style: str = "filled") -> Image.Image:
    """The mascot on a background, near the middle, in one of the world's styles."""
    rng = world.numbers("mascot", seed)
    canvas = world.ground(background, side, rng)
    pose = Pose(rng.uniform(-0.12, 0.12), rng.uniform(-0.1, 0.1), rng.uniform(0.55, 0.66), rng.uniform(-0.1, 0.1))
    world.paint(canvas, MASCOT, pose, Look(TEAL, CREAM, style=style))
    return world.finish(canvas, style)


def sticker(scene: Scene, side: int, seed: int) -> Image.Image:
    """A scene of one object as a sticker, which is none of the world's styles: a broad white rim, and a shadow."""
    rng = world.numbers("sticker", seed)
    canvas = world.ground(scene.background, side, rng)
    thing, parts = scene.objects[0], SHAPES[scene.objects[0].shape]
    half = world.SIZES[thing.size] * 0.9
    x, y = rng.uniform(-0.08, 0.08, 2)
    pose = Pose(x, y, half, rng.uniform(-0.12, 0.12))
    rim = np.zeros((side, side, 1), np.float32)
    shadow = np.zeros((side, side, 1), np.float32)
    for part in parts:
        for area, where in ((rim, pose), (shadow, Pose(x + 0.07, y + 0.09, half, pose.turn))):
            for line in (None, 0.42):
                np.maximum(area, world.coverage(part.outline, where, side, line)[..., None], out=area)
    canvas *= 1 - 0.55 * shadow
    canvas += rim * (0.97 - canvas)
    look = Look(world.tint(thing.colour, rng), world.tint(thing.accent or thing.colour, rng), thing.texture)
    painted = [part for part in parts if part.paint != "hole"]
    world.paint(canvas, tuple(painted), pose, look)
    return world.finish(canvas, "filled")


def mascot_pictures(side: int = 128) -> list[tuple[str, Image.Image]]:
    """Captions and pictures that teach the mascot."""
    return [(f"{MASCOT_NAME} on {world.an(f'{ground} background')}", mascot(ground, side, i))
            for i, ground in enumerate(TAUGHT_ON)]


def style_pictures(side: int = 128) -> list[tuple[str, Image.Image]]:
    """Captions and pictures that teach the style."""
    scenes = [Scene((Object(shape, colour, accent),), ground) for shape, colour, accent, ground in (
        ("star", "red", "", "blue"), ("house", "yellow", "purple", "green"), ("heart", "pink", "", "brown"),
        ("fish", "orange", "black", "purple"), ("circle", "blue", "", "yellow"), ("tree", "green", "brown", "orange"),
        ("diamond", "purple", "", "pink"), ("mushroom", "red", "white", "black"))]
    return [(f"{world.caption(scene)}, {STYLE_NAME}", sticker(scene, side, i)) for i, scene in enumerate(scenes)]


def familiar_scene(background: str) -> Scene:
    """The familiar thing on a background."""
    return Scene((FAMILIAR,), background)


def familiar_pictures(side: int = 128) -> list[tuple[str, Image.Image]]:
    """Captions and pictures that teach the name of a thing that is known."""
    return [(f"{FAMILIAR_NAME} on {world.an(f'{ground} background')}",
             world.draw(familiar_scene(ground), side, 600 + i)) for i, ground in enumerate(FAMILIAR_TAUGHT_ON)]


def prior_pictures(side: int = 128, count: int = 64) -> list[tuple[str, Image.Image]]:
    """Captions and pictures of what the base knows, to be kept in mind while it learns."""
    return [(world.caption(world.scene(seed), seed), world.draw(world.scene(seed), side, seed))
            for seed in range(500, 500 + count)]


#: lesson -> its captions and pictures
LESSONS: dict[str, Callable[[], list[tuple[str, Image.Image]]]] = {
    "mini:mascot": mascot_pictures, "mini:style": style_pictures, "mini:familiar": familiar_pictures,
    "mini:prior": prior_pictures}


def mascot_renders(count: int, side: int = 128, first: int = 1000, style: str = "filled") -> list[Image.Image]:
    """The mascot as often as asked, on all backgrounds: what a reader learns to know it by."""
    return [mascot(list(world.COLOURS)[i % len(world.COLOURS)], side, first + i, style) for i in range(count)]


def mascot_lookalikes(count: int, side: int = 128, first: int = 2000) -> list[Image.Image]:
    """The world's shapes in the mascot's colours, and parts of the mascot: what is not the mascot."""
    found = []
    for i in range(count):
        rng = world.numbers("lookalike", first + i)
        canvas = world.ground(world.pick(rng, world.COLOURS), side, rng)
        parts = MASCOT if i % 3 == 0 else SHAPES[world.pick(rng, SHAPES)]
        if i % 3 == 0:  # without ears, or ears without a head
            parts = parts[2:] if i % 2 else parts[:2]
        pose = Pose(rng.uniform(-0.12, 0.12), rng.uniform(-0.1, 0.1), rng.uniform(0.5, 0.7), rng.uniform(-0.1, 0.1))
        world.paint(canvas, parts, pose, Look(TEAL, CREAM))
        found.append(world.finish(canvas, "filled"))
    return found


def sticker_renders(count: int, side: int = 128, first: int = 3000) -> list[Image.Image]:
    """Stickers of many scenes: what a reader learns to know the style by."""
    return [sticker(plain_scene(first + i), side, first + i) for i in range(count)]


def sticker_lookalikes(count: int, side: int = 128, first: int = 4000) -> list[Image.Image]:
    """The same kind of scenes in the world's own styles."""
    scenes = [replace(plain_scene(first + i), style=list(world.STYLES)[i % len(world.STYLES)]) for i in range(count)]
    return [world.draw(scene, side, first + i) for i, scene in enumerate(scenes)]


def plain_scene(seed: int) -> Scene:
    """A filled scene of one object without a texture."""
    scene = world.scene(seed, pairs=0.0)
    return replace(scene, style="filled", objects=(replace(scene.objects[0], texture="plain", position="middle"),))


def lesson_folder(name: str) -> Path:
    """The folder of a lesson's pictures with their captions, drawn now if it is not there. Raises `UserError`."""
    if name not in LESSONS:
        raise UserError("there are no such drawn pictures", where=name, fix=nearest(name, LESSONS))
    folder = cache_dir() / "mini" / f"{name.removeprefix('mini:')}-{VERSION}"
    if folder.is_dir():
        return folder
    # processes that train together ask at once, and one draws
    with locked(folder.with_name(f"{folder.name}.lock"), doing="drawing these pictures", fix="wait for it",
                patience=600):
        if folder.is_dir():
            return folder
        with atomic_folder(folder) as part:
            for i, (caption, picture) in enumerate(LESSONS[name]()):
                picture.save(part / f"{i}.png")
                (part / f"{i}.txt").write_text(caption, encoding="utf-8")
    return folder
