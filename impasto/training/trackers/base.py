"""What a tracker is: it is told of a run, its figures and its pictures, and of the end."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: how one sitting of a run can end
Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Sitting:
    """One sitting of a run: what it is, and under which id it is known from its first sitting to its last."""

    name: str
    folder: Path  # the run's directory, where a tracker may keep files of its own
    recipe: dict[str, Any]  # every key with its value; of places on the disk the last part alone
    id: str
    resumed: bool


class Tracker(abc.ABC):
    """One place where a run is followed. Steps come in order, and each only once, whatever a resume takes again.

    `check` is called in the main thread before anything is loaded, all else in a thread of the tracker's own. What it
    raises there is told in one line, and it is not called again: the training goes on without it.
    """

    @classmethod
    @abc.abstractmethod
    def check(cls) -> None:
        """Raise `UserError` (`MissingExtra`) if what it needs is not installed."""

    @abc.abstractmethod
    def begin(self, sitting: Sitting) -> str:
        """Take up the run. Returns a line that says where to look, or nothing."""

    @abc.abstractmethod
    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of optimizer step `step` (from 1), by name."""

    def validation(self, step: int, loss: float) -> None:  # noqa: B027 - it may keep to what was trained on
        """The loss on held-out pictures after `step`, 0 before the first; after the figures of that step."""

    @abc.abstractmethod
    def pictures(self, step: int, pictures: Sequence[tuple[str, Path]]) -> None:
        """The previews after `step`: (prompt, file)."""

    @abc.abstractmethod
    def end(self, ending: Ending) -> None:
        """Let go of the run; after this nothing may be left behind that waits."""
