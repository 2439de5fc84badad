"""The drawn world: its captions are exact, its pictures show what they say, and what is held out stays out."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from impasto.mini import world
from impasto.mini.labels import LABEL_SIZES, QUESTIONS, answers, labels
from impasto.mini.lessons import ASKED_ON, LESSONS, TAUGHT_ON, lesson_folder
from impasto.mini.shapes import ACCENTS, SHAPES
from impasto.mini.world import COLOURS, Object, Scene, caption, draw, scene


def colour_share(picture: np.ndarray, colour: str, within: float = 60) -> float:
    """The share of pixels that are near a colour."""
    return float((np.abs(picture.astype(float) - COLOURS[colour]).max(-1) < within).mean())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [64, 128, 200])
def test_a_shape_covers_its_area_at_any_size(shape: str, side: int) -> None:
    """A plain large shape on white: the share of its pixels is its polygons' area, within the edges' few per cent."""
    thing = Object(shape, "blue", "blue" if shape in ACCENTS else "", size="large")
    picture = np.asarray(draw(Scene((thing,), "white"), side, 3))
    area = sum(polygon_area(part.outline) * (-1 if part.paint == "hole" else 1) for part in SHAPES[shape])
    expected = area * world.SIZES["large"] ** 2 / 4
    assert picture.shape == (side, side, 3)
    assert colour_share(picture, "blue") == pytest.approx(expected, rel=0.35)


def polygon_area(outline: np.ndarray) -> float:
    """Gauss's shoelace formula."""
    x, y = outline.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


@pytest.mark.parametrize(("position", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("top", 0, -1),
                                                        ("bottom", 0, 1)])
def test_a_position_is_where_it_says(position: str, axis: int, sign: int) -> None:
    picture = np.asarray(draw(Scene((Object("circle", "red", size="small", position=position),), "white"), 96, 1))
    red = np.argwhere(np.abs(picture.astype(float) - COLOURS["red"]).max(-1) < 50)
    assert (red.mean(0)[axis] - 47.5) * sign > 12
    assert abs(red.mean(0)[1 - axis] - 47.5) < 8


@pytest.mark.parametrize(("relation", "axis", "sign"), [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1),
                                                        ("below", 0, 1)])
def test_a_relation_is_as_it_says(relation: str, axis: int, sign: int) -> None:
    pair = Scene((Object("square", "red"), Object("circle", "blue")), "white", relation=relation)
    picture = np.asarray(draw(pair, 96, 5)).astype(float)
    middles = [np.argwhere(np.abs(picture - COLOURS[c]).max(-1) < 50).mean(0)[axis] for c in ("red", "blue")]
    assert (middles[0] - middles[1]) * sign > 20


def test_captions_say_what_is_there() -> None:
    thing = Object("star", "red", texture="striped", size="small", position="left")
    assert caption(Scene((thing,), "blue")) == "a small red striped star on the left, on a blue background"
    house = Object("house", "green", "orange")
    assert caption(Scene((house,), "white", "outlined")) == \
        "an outlined green house with an orange roof, on a white background"
    pair = Scene((Object("ring", "green"), Object("heart", "pink")), "white", relation="above")
    assert caption(pair) == "a green ring above a pink heart, on a white background"


def test_every_wording_names_every_fact() -> None:
    for seed in range(300):
        found = scene(seed)
        usual = {"medium", "middle", "plain", "filled"}
        words = [answer for answer in answers(found).values() if answer not in usual]
        assert all(word in caption(found, seed) for word in words), caption(found, seed)


def test_one_seed_is_one_picture() -> None:
    assert draw(scene(7), 64, 7).tobytes() == draw(scene(7), 64, 7).tobytes()
    assert draw(scene(7), 64, 7).tobytes() != draw(scene(7), 64, 8).tobytes()


def test_what_is_held_out_is_never_shown() -> None:
    shown = [scene(seed) for seed in range(3000)]
    kept = [scene(seed, held_out=True) for seed in range(300)]
    assert not any(found.held_out for found in shown)
    assert all(found.held_out for found in kept)
    combinations = {(o.shape, o.colour) for s in shown for o in s.objects}
    assert len(combinations) == len(SHAPES) * (len(COLOURS) - 1)  # each of the others does come


def test_each_style_and_texture_changes_the_picture() -> None:
    plain = Object("square", "red", size="large")
    pictures = [draw(Scene((plain,), "white", style), 64, 1).tobytes() for style in world.STYLES]
    pictures += [draw(Scene((dataclasses.replace(plain, texture=t),), "white"), 64, 1).tobytes()
                 for t in world.TEXTURES[1:]]
    assert len(set(pictures)) == len(pictures)


def test_labels_are_the_answers() -> None:
    for seed in range(100):
        found = scene(seed)
        numbers = labels(found)
        assert len(numbers) == len(LABEL_SIZES)
        told = {q: choices[n] for (q, choices), n in zip(QUESTIONS.items(), numbers, strict=True) if n >= 0}
        assert told == answers(found)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_a_folder_of_pictures_with_captions(name: str) -> None:
    folder = lesson_folder(name)
    pictures = sorted(folder.glob("*.png"))
    captions = [p.with_suffix(".txt").read_text() for p in pictures]
    if name == "mini:prior":  # what the base knows already
        assert len(pictures) == 64 and not any("sks" in text for text in captions)
    else:
        assert 5 <= len(pictures) <= 8 and all("sks" in text for text in captions)
    assert lesson_folder(name) == folder


def test_several_may_ask_for_a_lesson_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lesson_folder, ["mini:mascot"] * 4))
    assert len(set(folders)) == 1 and len(list(folders[0].glob("*.png"))) == len(TAUGHT_ON)


def test_the_mascot_is_asked_for_where_it_was_not_taught() -> None:
    assert not set(TAUGHT_ON) & set(ASKED_ON)
    assert set(TAUGHT_ON) | set(ASKED_ON) == set(COLOURS)
