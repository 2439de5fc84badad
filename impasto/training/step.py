"""One training step's loss: pure, and the one that the forecast traces too."""

from __future__ import annotations

from torch import Tensor

from impasto.core.rng import Draws
from impasto.families.base import Base
from impasto.objectives.base import Objective
from impasto.objectives.batch import Batch


def step(base: Base, batch: Batch, objective: Objective, draws: Draws) -> Tensor:
    """Per-sample losses of a batch, (B,), fp32, each weighted by its picture's weight.

    A pure function of weights, batch and draws: it reads no clock, no global generator of its own and no
    state of a run. (Dropout reads torch's global generator, which the caller seeds for each micro-step.)
    """
    return objective.loss(base, batch, draws) * batch.weight
