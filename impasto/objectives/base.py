"""What an objective is: a per-sample loss of a batch, a pure function of the batch and its draws."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

if TYPE_CHECKING:  # as in methods/base.py: options load no torch
    from torch import Tensor, nn

    from impasto.core.rng import Draws
    from impasto.families.base import Base
    from impasto.objectives.batch import Batch


#: makes a block in which the base is alone: what trains on it has no effect
Alone = Callable[[], AbstractContextManager[None]]


class ObjectiveOptions(pydantic.BaseModel):
    """The `[objective]` section. Each objective subclasses it with its own keys; `kind` picks the subclass."""

    model_config = pydantic.ConfigDict(extra="forbid")

    kind: str = "denoise"


class Objective(abc.ABC):
    """Turns a batch into one loss per sample."""

    Options: ClassVar[type[ObjectiveOptions]]
    #: what of a batch it looks at: pictures, captions, masks, and extras, which some denoisers are shown
    reads: ClassVar[frozenset[str]] = frozenset({"pictures", "captions"})

    #: whether it asks for the frozen base beside what trains
    needs_teacher: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @abc.abstractmethod
    def loss(self, base: Base, batch: Batch, draws: Draws) -> Tensor:
        """Per-sample losses, (B,), fp32, not yet weighted by `batch.weight`."""

    def prepare(self, base: Base, labels: Sequence[int], seed: int) -> dict[str, nn.Module]:
        """Weights of the objective's own that train beside the method's and are thrown away, by name: most have none.

        `labels`: how many values each label of the data has, none for pictures with captions alone.
        """
        return {}

    def meet(self, base: Base, alone: Alone, trains: frozenset[str]) -> None:  # noqa: B027 - most need none
        """Meet the teacher: within `alone()` the base computes as it did before `trains`, its components in which
        something trains, were touched. Called once, when all methods are in place."""

    def finish(self, base: Base, batches: Iterable[Batch]) -> None:  # noqa: B027 - most need none
        """Measure on some batches what belongs into an artifact beside weights, before it is saved."""
