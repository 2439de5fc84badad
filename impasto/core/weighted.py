"""A file and how strongly it counts, as people write it: "dog.safetensors:0.8"."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Weighted(NamedTuple):
    """A place, and a factor."""

    path: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Weighted:
        """What "PATH" or "PATH:0.8" says. Only a number at the end is a strength: "C:\\loras\\a.safetensors" is a path.

        Raises `ValueError` for a text without a path, and for a strength that is not finite.
        """
        path, colon, tail = text.rpartition(":")
        number = bool(colon) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", tail.strip())
        found = cls(path, float(tail)) if number else cls(text)
        if not found.path.strip():
            raise ValueError("names no file")
        if not math.isfinite(found.strength):
            raise ValueError(f"has a strength of {tail}")
        return found


def checked(text: str) -> str:
    """The text itself, if it can be parsed: a validator for options."""
    Weighted.parse(text)
    return text
