"""What a run leaves for other programs: adapters, or whole bases, in files and folders that they read."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from impasto.core.errors import UserError
from impasto.core.files import require_space
from impasto.data.source import Source
from impasto.deltas.adapter import Adapter
from impasto.families.base import Base
from impasto.families.difference import difference, layers_of
from impasto.families.save import save_folder
from impasto.formats.arrangement import save_arranged
from impasto.methods.base import Method
from impasto.objectives.base import Objective
from impasto.training.environment import DTYPES, describe
from impasto.training.metadata import metadata
from impasto.training.recipe import Recipe
from impasto.training.room import SPARE
from impasto.training.run import Run
from impasto.training.shown import Shown

#: steps whose batches an objective may measure before an artifact is saved
MEASURED_STEPS = 16


@dataclass
class Artifacts:
    """Saves what has been learned so far, as it is shown."""

    recipe: Recipe
    run: Run
    base: Base
    methods: Sequence[Method]
    objective: Objective
    source: Source
    shown: Shown
    device: torch.device
    fingerprint: dict[str, str]  # of the base's files as the run found them

    @property
    def whole(self) -> bool:
        """Whether they are whole bases, in folders."""
        return any(method.in_place for method in self.methods) and self.recipe.output.format != "delta"

    def check(self) -> None:
        """Raise `UserError` for what can be trained and could not be saved, before it is trained."""
        if self.recipe.output.format == "delta":
            layers_of(self.base)

    def path(self, step: int | Literal["best"] | None = None) -> Path:
        """Where the artifact of an optimizer step goes, or the best one, or the last."""
        if self.whole:
            return self.run.artifact(step, suffix="")
        suffixes = {method.suffix for method in self.methods}
        return self.run.artifact(step, suffix=suffixes.pop() if len(suffixes) == 1 else ".safetensors")

    def size(self) -> int:
        """Bytes of one, metadata left out."""
        if self.whole:
            numbers = sum(self.base.numbers(name) for name in self.base.components)
        else:
            numbers = sum(parameter.numel() for method in self.methods for module in method.modules().values()
                          for parameter in module.parameters())
        return DTYPES[self.recipe.output.dtype].itemsize * numbers

    def save(self, path: Path, step: int) -> None:
        """Write what optimizer step `step` has left at `path`, one of `path`'s. Raises `UserError`."""
        output, best = self.recipe.output, path == self.path("best")
        require_space(path, self.size() + SPARE, f"the artifact of step {step}")
        with self.shown.weights(), self.base.keeping_latent_scale():
            measured = (batch.to(self.device) for later in range(MEASURED_STEPS)
                        for batches in self.source.micro_batches(step + later) for batch in batches)
            self.objective.finish(self.base, measured)
            adapters = [adapter for method in self.methods if (adapter := method.adapter()) is not None]
            if output.format == "delta":
                adapters.append(self._delta())
            if not adapters:
                if best or not path.exists():  # else it was saved before a kill, or the run is complete
                    changed = None if self.base.merged else self.base.trained()  # the file does not hold what is merged
                    save_folder(self.base, path, dtype=DTYPES[output.dtype], metadata=self._metadata(step),
                                replace=best, changed=changed)
                return
        adapter = functools.reduce(operator.add, adapters)
        adapter = dataclasses.replace(adapter, family=self.base.family, base=self.fingerprint)
        format = "auto" if output.format == "delta" else output.format
        save_arranged(adapter, path, format=format, dtype=DTYPES[output.dtype], metadata=self._metadata(step))

    def _delta(self) -> Adapter:
        """What has changed in the base's own weights, by a look at its file."""
        names = {path.partition(".")[0] for path in self.base.trained()}
        if self.base.origin(names) != {name: self.fingerprint[name] for name in names}:
            raise UserError("is not what it was when this run began: what has been learned cannot be told from it",
                            where=self.base.source or "", fix="put the base back, or say output.format=diffusers")
        return difference(self.base)

    def _metadata(self, step: int) -> dict[str, str]:
        """What the artifact of a step tells of how it was made."""
        if self.recipe.output.metadata == "none":
            return {}
        return metadata(self.recipe, step, base=self.fingerprint, data=self.source.fingerprint,
                        environment=describe(self.device), merged=self.base.merged,
                        prediction=self.base.process.prediction)
