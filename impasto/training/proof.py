"""Exact resume, proved on the user's own machine: the same few steps, uninterrupted and interrupted, bit by bit."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.training.recipe import Recipe
from impasto.training.run import STATE
from impasto.training.trainer import train

#: optimizer steps of the proof, and after which of them one of its two runs is stopped
STEPS, STOP = 6, 3


@dataclass(frozen=True)
class Proof:
    """How the two runs compare."""

    tensors: int  # weights, averages and optimizer states that were compared
    differing: dict[str, float]  # names of those that are not equal to the bit, with their largest difference

    @property
    def exact(self) -> bool:
        return not self.differing


def verify_resume(recipe: Recipe, report: Reporter = SILENT) -> Proof:
    """Train a recipe's first steps twice in a temporary directory, once with a stop, and compare the two ends.

    Everything is as in the recipe but the number of steps, and that nothing is drawn on the way, or told to others.
    Raises `UserError`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("exact resume is proved with one process", where="--verify-resume",
                        fix="run it without torchrun")
    with tempfile.TemporaryDirectory(prefix="impasto-proof-") as folder:
        def short(name: str) -> Recipe:
            plain = recipe.model_copy(deep=True)
            plain.train = plain.train.model_copy(update={"steps": STEPS, "epochs": None})
            plain.sample.every = 0
            plain.validation.patience = None
            plain.output = plain.output.model_copy(update={
                "dir": str(Path(folder) / name), "save_every": 0, "save_every_epochs": 0, "checkpoint_every": STOP,
                "trackers": [], "push_to": None})
            return plain

        with report.phase("uninterrupted"):
            train(short("straight"))
        with report.phase("stopped, and taken up again"):
            train(short("stopped"), stop_after=STOP)
            resumed = train(short("stopped"))
        assert resumed.resumed_from == STOP
        straight, stopped = (load_file(Path(folder) / name / "checkpoints" / f"{STEPS:06d}" / STATE)
                             for name in ("straight", "stopped"))
    return Proof(len(straight), {name: (tensor.double() - stopped[name].double()).abs().max().item()
                                 for name, tensor in straight.items() if not torch.equal(tensor, stopped[name])})
