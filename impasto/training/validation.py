"""Validation: the loss on held-out pictures, always with the same noise at the same timesteps, and the lowest so far.

The loss of a step hangs on its draws far more than on what was learned. Here each picture has the same few draws at
every validation, so that what differs between two of them is the weights alone; and a picture's timesteps lie one in
each equal part of the process (stratified: their mean moves less than that of free ones). Nothing else is left to
chance: no dropout, no mirrored pictures, whole captions. It is of the weights that artifacts hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from impasto.core.files import key_of
from impasto.core.progress import Reporter
from impasto.core.rng import Draws, generator
from impasto.data.options import ValidationOptions
from impasto.data.source import Source
from impasto.families.base import Base
from impasto.objectives.base import Objective
from impasto.training.environment import Precision
from impasto.training.step import step as step_losses

#: where a recipe does not say: validations in a run, and the fewest steps between two of them
TIMES, FEWEST_STEPS = 20, 25

#: draws of a validation for each picture trained between two: without gradients a draw takes a third of the time that
#: it takes in training, so that validation takes a sixth of a run at most
DRAWS_A_PICTURE = 0.5


class FixedDraws(Draws):
    """The draws of some uses of held-out pictures, each keyed by (picture's content, repeat), and by no step."""

    def __init__(self, seed: int, uses: Sequence[tuple[str, int]], repeats: int,
                 device: torch.device | str = "cpu") -> None:
        super().__init__(seed, 0, range(len(uses)), device)
        self.uses, self.repeats = list(uses), repeats

    def _rows(self, use: str, shape: Sequence[int], draw: Any) -> Tensor:
        return torch.stack([draw(tuple(shape), generator=generator(self.seed, "validation", picture, repeat, use))
                            for picture, repeat in self.uses]).to(self.device)

    def uniform(self, use: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0, 1), (B, *shape), fp32. The one number that a sample has of a use, such as its time, lies
        in the `repeat`-th of `repeats` equal parts."""
        free = super().uniform(use, shape)
        if shape:
            return free
        parts = torch.tensor([float(repeat) for _, repeat in self.uses], device=self.device)
        return ((parts + free) / self.repeats).clamp(max=1 - 2**-24)  # the sum may round up


@final
class Validation:
    """When to validate, how, and what has come of it so far: the lowest loss, its step, and how long it has stood.

    `pictures` is how many an optimizer step learns from. The loss before the first step is one to compare with, and
    never the lowest.
    """

    def __init__(self, options: ValidationOptions, source: Source, seed: int, total: int, pictures: int,
                 report: Reporter) -> None:
        self.options, self.source, self.seed, self.total, self.report = options, source, seed, total, report
        held_out = source.held_out
        self.uses = [(place, repeat) for place in sorted(range(len(held_out)), key=lambda i: (
            held_out[i].placement.bucket, i)) for repeat in range(options.repeats)]
        seldom = math.ceil(len(self.uses) / (DRAWS_A_PICTURE * pictures))
        self.every = options.every or max(FEWEST_STEPS, math.ceil(total / TIMES), seldom)
        self.last: float | None = None
        self.best: float | None = None
        self.best_step = 0
        self.since = 0  # validations after that of the lowest loss
        self.at: int | None = -1  # the step of the last one; None if an older version did not tell

    def describe(self) -> list[str]:
        """When and how, in a line for the user; nothing where no picture is held out."""
        if not self.uses:
            return []
        ending = f", and ends the run after {self.options.patience} without a new lowest loss" \
            if self.options.patience else ""
        return [f"validation every {self.every} steps, with {self.options.repeats} draws for each of "
                f"{len(self.source.held_out)} held-out pictures{ending}"]

    # --- the loss ----------------------------------------------------------------------------------------
    def due(self, step: int) -> bool:
        """Whether to validate after optimizer step `step`: before the first, after the last and every N steps."""
        return bool(self.uses) and (step in (0, self.total) or step % self.every == 0)

    def missed(self, step: int) -> bool:
        """Whether the one that is due after `step` has not been done yet."""
        return self.due(step) and self.at is not None and self.at < step

    @torch.no_grad()
    def loss(self, base: Base, objective: Objective, precision: Precision, device: torch.device,
             stop: Callable[[], bool] = bool) -> float | None:
        """The mean loss over all uses of held-out pictures, of the weights as they are now; None if `stop` says so
        in the midst of it."""
        total = 0.0
        with precision.autocast():
            for uses in self._batches():
                if stop():
                    return None
                batch = self.source.validation_batch([place for place, _ in uses]).to(device)
                keys = [(self.source.held_out[place].picture.digest, repeat) for place, repeat in uses]
                draws = FixedDraws(self.seed, keys, self.options.repeats, device)
                total += sum(step_losses(base, batch, objective, draws).tolist())
        return total / len(self.uses)

    def _batches(self) -> list[list[tuple[int, int]]]:
        """All uses, in batches of one shape: never more pictures than in training, always the same together."""
        made: list[list[tuple[int, int]]] = []
        shape = None
        for place, repeat in self.uses:
            own = self.source.held_out[place].placement.bucket
            if own != shape or len(made[-1]) == self.source.share.batch_size:
                made.append([])
            made[-1].append((place, repeat))
            shape = own
        return made

    # --- what has come of it -----------------------------------------------------------------------------
    def take(self, step: int, loss: float) -> bool:
        """Note the loss after a step; whether it is the lowest so far."""
        self.last, self.at = loss, step
        if not math.isfinite(loss):
            self.report.warn(f"the validation loss is not finite at step {step}")
        if step == 0:
            return False
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best, self.best_step, self.since = loss, step, 0
            return True
        self.since += 1
        return False

    @property
    def over(self) -> str | None:
        """Why the run ends before its last step, if it does."""
        if self.options.patience is None or self.since < self.options.patience:
            return None
        lowest = "the validation loss was never finite" if self.best is None else \
            f"the lowest validation loss is {self.best:.4g}, of step {self.best_step}"
        return f"{lowest}; none of the {self.since} validation{'s' * (self.since > 1)} since has bettered it"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"best": self.best, "best_step": self.best_step, "since": self.since, "at": self.at,
                "pictures": self._pictures()}

    def load(self, state: dict[str, Any] | None) -> None:
        """Put back what `state` gave; of other pictures the losses do not compare, and are forgotten."""
        if state is None:
            return
        self.at = state.get("at")
        if state["pictures"] != self._pictures():
            if state["best"] is not None:
                self.report.warn("the held-out pictures have changed: the lowest loss so far is forgotten")
            return
        self.best, self.best_step, self.since = state["best"], state["best_step"], state["since"]

    def _pictures(self) -> str:
        return key_of(self.seed, self.options.repeats, [
            (item.picture.digest, item.caption, item.placement, *item.own_facts) for item in self.source.held_out])
