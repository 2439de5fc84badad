"""What a run says of itself while it trains: log.jsonl, TensorBoard, trackers, and the live line."""

from __future__ import annotations

import collections
import contextlib
import math
from types import TracebackType

import psutil
import torch

from impasto.core.errors import UserError
from impasto.training.board import Board
from impasto.training.optimizers import effective_rate
from impasto.training.run import Run
from impasto.training.trackers.tracking import Tracking

#: seconds that a step takes at least, as far as is told: some clocks stand still for so long
TICK = 1e-3


class Journal:
    """Writes one entry a step; the mean loss is over the last 50. Of several processes one writes."""

    def __init__(self, run: Run, device: torch.device, first: int, tracking: Tracking | None) -> None:
        self.run, self.device, self.tracking = run, device, tracking
        self.validation: float | None = None  # the last loss on held-out pictures
        self.finished = False  # all steps are taken
        self.recent: collections.deque[float] = collections.deque(maxlen=50)
        self.board: Board | None = None
        if tracking is None:  # another process writes
            return
        if first:
            run.log(event="resumed", step=first)
        self.board = Board(run.folder / "tensorboard", first)
        tracking.begin(first)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.board is not None and self.tracking is not None:
            with contextlib.suppress(UserError):  # every line has been written
                self.board.close()
            self.tracking.end("failed" if kind else "finished" if self.finished else "stopped")

    @property
    def mean_loss(self) -> float | None:
        return sum(self.recent) / len(self.recent) if self.recent else None

    def memory(self) -> int:
        """Peak bytes allocated on a GPU; bytes resident in this process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def step(self, step: int, loss: float, norm: float, optimizer: torch.optim.Optimizer, pictures: int,
             seconds: float) -> str:
        """Record optimizer step `step` (from 1); a short text for the live line."""
        self.recent.append(loss)
        if self.board is None or self.tracking is None:
            return ""
        rate, seconds = effective_rate(optimizer), max(seconds, TICK)
        memory = self.memory()
        figures = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "seconds": round(seconds, 4),
                   "pictures_per_second": round(pictures / seconds, 3), "memory": memory}
        self.run.log(step=step, **figures)
        self.board.add(step, loss=loss, learning_rate=rate, gradient_norm=norm)
        self.tracking.figures(step, {**figures, "mean_loss": self.mean_loss or 0.0})
        validation = "" if self.validation is None else f" · validation {self.validation:.4f}"
        return f"loss {self.mean_loss:.4f}{validation} · {pictures / seconds:.2f} pictures/s · {memory / 2**30:.1f} GiB"

    def validated(self, step: int, loss: float) -> None:
        """Record the loss on held-out pictures after optimizer step `step`, 0 before the first."""
        self.validation = loss
        if self.board is None or self.tracking is None:
            return
        self.run.log(step=step, validation=loss if math.isfinite(loss) else None)  # JSON has no NaN
        self.board.add(step, validation_loss=loss)
        if math.isfinite(loss):
            self.tracking.validation(step, loss)
