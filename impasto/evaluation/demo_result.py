"""How a demo went: its figures, what they should be, and what its page shows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from impasto.evaluation.quality import Asked

#: shares that a demo which went well shows: it recognises nothing before, most after, does what else the prompt says,
#: and has hardly forgotten what it knew
AT_MOST_BEFORE, AT_LEAST_AFTER, AT_LEAST_BACKGROUNDS, AT_MOST_LOST = 0.05, 0.8, 0.8, 0.05


class Score(NamedTuple):
    """So many of so many."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """Right ones among all; 0 of none."""
        return self.right / self.count if self.count else 0.0

    def __str__(self) -> str:
        return f"{self.right} of {self.count}"


@dataclass(frozen=True)
class Scores:
    """What the reader sees in the pictures."""

    recognised_before: Score
    recognised_after: Score
    backgrounds: Score  # as asked for, after
    old_before: Score  # shape, colour and background of what was known, all three right
    old_after: Score

    @property
    def lost(self) -> float:
        """The share of old prompts that the fine-tune cost; below 0 if it gained some."""
        return self.old_before.share - self.old_after.share


@dataclass(frozen=True)
class DemoResult:
    """How a demo went."""

    lesson: str
    seed: int
    adapter: Path
    page: Path
    scores: Scores
    size: int  # bytes of the adapter's file
    seconds: dict[str, float]  # by phase; all sittings of an interrupted demo together
    memory: int  # the most bytes that were resident, in the last sitting

    def plain(self) -> dict[str, Any]:
        """All of it, JSON-able; shares lie in 0 … 1."""
        shares = {field.name: getattr(self.scores, field.name).share for field in fields(self.scores)}
        return {"lesson": self.lesson, "seed": self.seed, "adapter": str(self.adapter), "report": str(self.page),
                **shares, "lost": self.scores.lost, "size": self.size, "seconds": round(sum(self.seconds.values()), 2),
                "seconds_by_phase": self.seconds, "memory": self.memory}


@dataclass(frozen=True)
class Material:
    """What the page shows."""

    new: list[Asked]
    old: list[Asked]
    before: list[Image.Image]  # new ones, then old ones
    after: list[Image.Image]
    taught: list[tuple[str, Image.Image]]
    strip: list[tuple[int, Image.Image]]
    losses: list[float]
