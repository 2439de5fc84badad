"""How one sitting of a run ended, for whoever started it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    artifact: Path | None  # None if it was stopped before the last step
    step: int
    resumed_from: int
    loss: float | None  # the mean over the last steps, None if none was taken
    seconds: float
    stopped_by: signal.Signals | None = None
    rank: int = 0  # which of the processes tells of it
    validation: float | None = None  # the last loss on held-out pictures, None if there was none
    ended: str | None = None  # why it is finished before its last step
    allocated: int | None = None  # the most bytes of tensors, where they were counted
