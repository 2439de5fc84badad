"""Weights & Biases. Its own variables hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_BASE_URL."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from impasto.core.errors import MissingExtra, UserError
from impasto.training.trackers.base import Ending, Sitting, Tracker

#: seconds that the library may take for its greeting, and at the end for what is still to go up
GREETING, FAREWELL = 60.0, 60.0


class WeightsBiases(Tracker):
    """A W&B run, taken up again by its id; the library sends from a process of its own."""

    run: Any
    first: int  # the library takes no step before this one

    @classmethod
    def check(cls) -> None:
        _library()

    def begin(self, sitting: Sitting) -> str:
        wandb = _library()
        offline = wandb.setup().settings.mode != "online"
        if not offline and not wandb.login(prompt=False):  # else it would ask for a key in the middle of the training
            raise UserError("there is no key", fix="wandb login, or WANDB_API_KEY; WANDB_MODE=offline does without")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "impasto"), name=os.environ.get("WANDB_NAME", sitting.name),
            id=sitting.id, resume=None if offline else "allow", dir=str(sitting.folder), config=sitting.recipe,
            allow_val_change=True,
            settings={"silent": True, "console": "off", "save_code": False, "disable_git": True,
                      "init_timeout": GREETING, "finish_timeout": FAREWELL})
        self.first = self.run.step
        self.run.define_metric("*", step_metric="step")  # its own step may be a later one, see `first`
        return f"kept in {self.run.dir}; wandb sync sends it" if offline else self.run.url or ""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log({"step": step, **{f"train/{name}": value for name, value in figures.items()}},
                     step=max(step, self.first))

    def validation(self, step: int, loss: float) -> None:
        self.run.log({"step": step, "validation/loss": loss}, step=max(step, self.first))

    def pictures(self, step: int, pictures: Sequence[tuple[str, Path]]) -> None:
        image = _library().Image
        self.run.log({"step": step, "previews": [image(str(file), caption=prompt) for prompt, file in pictures]},
                     step=max(step, self.first))

    def end(self, ending: Ending) -> None:
        self.run.summary["ending"] = ending
        self.run.finish(exit_code=1 if ending == "failed" else 0)


def _library() -> Any:
    """The package. Raises `MissingExtra` without it; a folder ./wandb, such as it leaves behind, is not it."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise MissingExtra("wandb", "wandb") from None
    if not hasattr(wandb, "init"):
        raise MissingExtra("wandb", "wandb")
    return wandb
