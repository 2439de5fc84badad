"""A stand-in for the reader of pictures, which needs weights: it gives the answers that it is told to give."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from PIL import Image


class Reader:
    """Says the same of every picture."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        return [self.answers for _ in pictures]


class Recogniser:
    """Knows nothing at first, and everything when it is asked again."""

    def __init__(self) -> None:
        self.asked = 0

    def knows(self, pictures: Sequence[Image.Image]) -> list[bool]:
        self.asked += 1
        return [self.asked > 1] * len(pictures)


def module() -> ModuleType:
    """What stands for impasto.evaluation.reader."""
    made = ModuleType("impasto.evaluation.reader")
    answers = {"shape": "star", "colour": "red", "background": "red"}
    shown: list[int] = []

    def extend(reader: Reader, positives: Sequence[Image.Image], negatives: Sequence[Image.Image],
               seed: int = 0) -> Recogniser:
        shown[:] = [len(positives), len(negatives)]
        return Recogniser()

    vars(made).update(load_reader=lambda: Reader(answers), extend=extend, shown=shown, answers=answers)
    return made
