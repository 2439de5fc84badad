"""What an objective is: a per-sample loss of a batch, a pure function of the batch and its draws."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import pydantic
from torch import Tensor

from impasto.core.rng import Draws
from impasto.families.base import Base
from impasto.objectives.batch import Batch


class ObjectiveOptions(pydantic.BaseModel):
    """The `[objective]` section. Each objective subclasses it with its own keys; `kind` picks the subclass."""

    model_config = pydantic.ConfigDict(extra="forbid")

    kind: str = "denoise"


class Objective(abc.ABC):
    """Turns a batch into one loss per sample. Holds options only, no state."""

    Options: ClassVar[type[ObjectiveOptions]]

    def __init__(self, options: Any) -> None:
        self.options = options

    @abc.abstractmethod
    def loss(self, base: Base, batch: Batch, draws: Draws) -> Tensor:
        """Per-sample losses, (B,), fp32, not yet weighted by `batch.weight`."""
