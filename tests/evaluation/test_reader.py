"""The reader of pictures: what it answers, what it learns; and, with its weights, how well it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from impasto.core.errors import UserError
from impasto.evaluation import damage
from impasto.evaluation.lesson import LESSONS, Amounts, Drawings, world_renders
from impasto.evaluation.reader import ANSWERS, BROKEN, NONE, Reader, extend, load_reader, numbered, pixels_of, truth
from impasto.mini import READER, lessons, world
from impasto.mini.labels import QUESTIONS
from impasto.mini.world import Object, Scene
from scripts.train_reader import BROKEN_SHAPE, PAIRS, SHAPE, accuracy, batch, draw, train

trained = pytest.mark.skipif(not READER.is_file(), reason="has no trained reader yet (impasto/mini/reader.safetensors)")


def renders(first: int, count: int, pairs: float = 0.2) -> list[Image.Image]:
    """Pictures of the world."""
    return [world.draw(world.scene(seed, pairs=pairs), 128, seed) for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def untrained() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader()


# --- answers -----------------------------------------------------------------------------------------------------


def test_two_objects_have_no_order_in_a_picture() -> None:
    star, heart = Object("star", "red"), Object("heart", "blue")
    for one, other in (("left of", "right of"), ("above", "below")):
        found = truth(Scene((star, heart), "white", relation=one))
        assert found == truth(Scene((heart, star), "white", relation=other))
        assert (found["shape"], found["relation"], found["second shape"]) == ("star", one, "heart")


def test_one_object_has_no_relation() -> None:
    found = truth(Scene((Object("star", "red"),), "white"))
    assert found["relation"] == NONE and "second shape" not in found and "accent" not in found


def test_answers_have_numbers() -> None:
    for seed in range(40):
        found = truth(world.scene(seed, pairs=0.5))
        numbers = numbered(found)
        assert {q: ANSWERS[q][n] for q, n in zip(ANSWERS, numbers, strict=True) if n >= 0} == found
    assert numbered({}) == [-1] * len(QUESTIONS)


def test_only_what_can_be_asked_is_answered(untrained: Reader) -> None:
    """Whatever the network says, its answers are of one object, of two, of nothing, or of a broken picture."""
    single = {"shape", "colour", "background", "relation", "texture", "position", "size", "style"}
    pair = {"shape", "colour", "background", "relation", "second shape", "second colour"}
    seen = set()
    for i in range(5):
        torch.manual_seed(i)
        for found in Reader().train().read(renders(0, 24)):
            seen.add(frozenset(found))
            assert all(answer in ANSWERS[question] for question, answer in found.items())
    assert seen <= {frozenset(s) for s in (single, single | {"accent"}, pair, {"shape", "background"}, {"shape"})}
    assert untrained.read([]) == []


def test_pictures_of_any_size_and_kind_are_read(untrained: Reader) -> None:
    pictures = [Image.new("RGB", (64, 64), "red"), Image.new("RGBA", (100, 130), "red"), Image.new("L", (300, 300))]
    assert pixels_of(pictures).shape == (3, 3, 128, 128)
    assert len(untrained.read(pictures)) == 3
    assert untrained.features(pictures).shape[0] == 3
    large = world.draw(world.scene(1), 256, 1)
    apart = pixels_of([large]).float() - pixels_of([large.reduce(2)]).float()
    assert float(apart.abs().max()) <= 1  # rounding


def test_a_missing_reader_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reader.*scripts.train_reader"):
        load_reader(tmp_path / "reader.safetensors")


# --- learning ----------------------------------------------------------------------------------------------------


def test_a_trained_reader_loads_as_it_was(tmp_path: Path) -> None:
    pool = draw(48, 5, nothing=0.1)
    found = train(Reader(), pool, 2, tmp_path / "reader.safetensors")
    again = load_reader(tmp_path / "reader.safetensors")
    same = (again.answer(pool[0]) == found.answer(pool[0])).float().mean()
    assert float(same) > 0.97  # half precision
    assert (tmp_path / "reader.safetensors").stat().st_size < 3e6


def test_a_batch_has_whole_and_broken_pictures() -> None:
    pool = draw(64, 5, nothing=0.1)
    pixels, answers = batch(pool, 1)
    told = answers[:, SHAPE] == BROKEN_SHAPE
    assert 4 < int(told.sum()) < 12
    assert ((answers[told] >= 0).sum(1) == 1).all()  # nothing else is asked of them
    assert torch.equal(pixels, batch(pool, 1)[0]) and not torch.equal(pixels, batch(pool, 2)[0])


def test_an_untrained_reader_can_be_taught_a_colour(untrained: Reader) -> None:
    """Random features are enough to tell red grounds from others."""
    def on(colours: list[str], first: int) -> list[Image.Image]:
        return [lessons.mascot(colour, 64, first + i) for i in range(4) for colour in colours]

    others = [c for c in world.COLOURS if c not in ("red", "pink", "orange", "brown")]
    known = extend(untrained, on(["red"], 0), on(others, 10))
    assert all(known.knows(on(["red"], 20)))
    assert not any(known.knows(on(others, 30)))
    again = extend(untrained, on(["red"], 0), on(others, 10))
    assert torch.equal(known.weight, again.weight)


# --- with its weights --------------------------------------------------------------------------------------------


@trained
def test_unseen_pictures_are_read(reader: Reader) -> None:
    pixels, answers = draw(2000, 40_000_000, nothing=0.0)
    clean, softened = accuracy(reader, pixels, answers), accuracy(reader, damage.mild(pixels, 3), answers)
    for share in clean.items():
        assert share[1] >= 0.99, share
    for share in softened.items():
        assert share[1] >= 0.97, share


@trained
@pytest.mark.parametrize("side", [64, 128, 256])
def test_pictures_of_any_size_say_the_same(reader: Reader, side: int) -> None:
    scenes = [world.scene(seed, pairs=PAIRS) for seed in range(31_000_000, 31_000_040)]
    found = reader.read([world.draw(scene, side, i) for i, scene in enumerate(scenes)])
    wrong = [(f, truth(s)) for f, s in zip(found, scenes, strict=True) if f != truth(s)]
    assert len(wrong) <= 2, wrong


@trained
def test_nothing_and_broken_pictures_are_told(reader: Reader) -> None:
    grounds = [world.finish(world.ground(colour, 128, world.numbers("ground", i)), "filled")
               for i, colour in enumerate(world.COLOURS)]
    assert reader.read(grounds) == [{"shape": NONE, "background": colour} for colour in world.COLOURS]
    doodles = reader.read([world.doodle(128, seed) for seed in range(900_000, 900_050)])
    assert sum(found["shape"] in (NONE, BROKEN) for found in doodles) >= 40
    pixels, _ = draw(200, 32_000_000, nothing=0.0)
    told = reader.answer(damage.strong(pixels, 5))[:, SHAPE] == BROKEN_SHAPE
    assert float(told.float().mean()) > 0.93


@trained
@pytest.mark.parametrize("name", [name for name, lesson in LESSONS.items() if isinstance(lesson.sign, Drawings)])
def test_a_lesson_can_be_taught(reader: Reader, name: str) -> None:
    lesson = LESSONS[name].sign
    assert isinstance(lesson, Drawings)
    count = Amounts().renders * lesson.harder
    known = extend(reader, lesson.renders(count, 128), [*lesson.lookalikes(count, 128), *world_renders(2 * count, 128)])

    def share(pictures: list[Image.Image]) -> float:
        return sum(known.knows(pictures)) / len(pictures)

    # a style is harder to know by a plane through features than a thing
    least, most = (0.98, 0.02) if name == "style" else (0.99, 0.01)
    assert share(lesson.renders(500, 128)[count:]) >= least
    assert share(lesson.lookalikes(500, 128)[count:]) <= 0.02
    assert share(renders(70_000, 400, pairs=PAIRS)) <= most


@trained
def test_a_known_thing_is_known_by_the_readers_answers(reader: Reader) -> None:
    sign = LESSONS["familiar"].sign
    assert not isinstance(sign, Drawings)
    grounds = [colour for colour in world.COLOURS if colour != lessons.FAMILIAR.colour]
    own = [world.draw(lessons.familiar_scene(ground), 128, 5_000 + i) for i, ground in enumerate(20 * grounds)]
    scenes = [lessons.plain_scene(6_000 + i) for i in range(100)]  # without the texture
    alike = [replace(scene, objects=(replace(scene.objects[0], shape=lessons.FAMILIAR.shape, accent=""),))
             for scene in scenes]
    others = [world.draw(scene, 128, 6_000 + i) for i, scene in enumerate([*scenes, *alike])]
    told = [[sign.items() <= answers.items() for answers in reader.read(pictures)] for pictures in (own, others)]
    assert sum(told[0]) >= 0.99 * len(own) and sum(told[1]) <= 0.01 * len(others)
