"""How well a base draws what it is asked for: prompts whose truth is known, and the marks of its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from impasto.core.progress import SILENT, Reporter
from impasto.core.rng import seed_for
from impasto.evaluation.reader import exchanged, oriented
from impasto.families.base import Base
from impasto.families.pictures import Adapters, Shot, draw
from impasto.families.sample_settings import SampleSettings
from impasto.mini import world
from impasto.mini.labels import answers

#: the embedded base's sampler, and how strongly it is guided
SCHEDULER, GUIDANCE, STEPS = "dpm++2m", 4.0, 25
#: pictures drawn at once
BATCH = 16

#: questions that are only right together
JOINT: dict[str, tuple[str, ...]] = {
    "all three": ("shape", "colour", "background"),
    "second object": ("second shape", "second colour"),
    "whole pair": ("shape", "colour", "second shape", "second colour", "relation", "background"),
}
#: the texture where the prompt names one: plain goes without saying
NAMED_TEXTURE = "texture, where named"


@dataclass(frozen=True)
class Asked:
    """A prompt, its picture's seed, and the answers that a right picture gives."""

    prompt: str
    seed: int
    truth: Mapping[str, str]
    scene: world.Scene | None = None  # None where the world has no such thing


@dataclass(frozen=True)
class Marks:
    """Question -> how many pictures answer it rightly, and of how many it was asked."""

    counts: Mapping[str, tuple[int, int]]

    def share(self, question: str) -> float | None:
        """The share of right answers; None where nobody asked."""
        right, count = self.counts.get(question, (0, 0))
        return right / count if count else None


def ask(count: int, seed: int, *, held_out: bool = False, pairs: float = 0.2) -> list[Asked]:
    """So many prompts of random scenes of the world, which no training has drawn; see `world.scene`."""
    found = []
    for i in range(count):
        own = seed_for("asked", seed, held_out, i)
        scene = world.scene(own, pairs=pairs, held_out=held_out)
        found.append(Asked(world.caption(scene, own), seed + i, oriented(answers(scene)), scene))
    return found


def settings(side: int, steps: int = STEPS, guidance: float = GUIDANCE) -> SampleSettings:
    """How the embedded base draws best."""
    return SampleSettings(steps=steps, guidance=guidance, scheduler=SCHEDULER, width=side, height=side)


def drawn(base: Base, asked: Sequence[Asked], how: SampleSettings, *, adapters: Adapters = (), batch: int = BATCH,
          report: Reporter = SILENT) -> Iterator[Image.Image]:
    """The base's picture of each prompt, in their order."""
    shots = [Shot(each.prompt, each.seed, each.prompt, adapters) for each in asked]
    for _, picture in draw(base, shots, how, batch=batch, report=report):
        yield picture


def rendered(asked: Sequence[Asked], side: int) -> list[Image.Image]:
    """The world's own picture of each prompt: what a perfect base would draw."""
    return [world.draw(each.scene, side, each.seed) for each in asked if each.scene is not None]


def mark(asked: Sequence[Asked], read: Sequence[Mapping[str, str]]) -> Marks:
    """Compare what was read off the pictures with what was asked for."""
    counts: dict[str, tuple[int, int]] = {}

    def note(question: str, right: bool) -> None:
        before = counts.get(question, (0, 0))
        counts[question] = (before[0] + right, before[1] + 1)

    for each, seen in zip(asked, read, strict=True):
        found = _matched(each.truth, seen)
        right = {question: found.get(question) == answer for question, answer in each.truth.items()}
        for question, is_right in right.items():
            note(question, is_right)
        for name, questions in JOINT.items():
            if right.keys() >= set(questions):
                note(name, all(right[question] for question in questions))
        if each.truth.get("texture", "plain") != "plain":
            note(NAMED_TEXTURE, right["texture"])
    return Marks(counts)


def _matched(truth: Mapping[str, str], found: Mapping[str, str]) -> Mapping[str, str]:
    """What was read, two objects in the order of the truth: if they changed places, their relation alone is wrong."""
    if "second shape" not in truth or "second shape" not in found:
        return found
    swapped = exchanged(found) | {"relation": "the other way"}

    def agreeing(answers: Mapping[str, str]) -> int:
        return sum(answers[question] == truth[question]
                   for question in ("shape", "colour", "second shape", "second colour"))

    return swapped if agreeing(swapped) > agreeing(found) else found
