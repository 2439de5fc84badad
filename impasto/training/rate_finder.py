"""A learning rate found by trial: short runs of the recipe at rising rates, judged by the loss on held-out pictures.

Smith 2015 (arXiv:1506.01186) lets the rate rise within one run and reads the training loss. Denoising hides what a
step taught behind the draw of its timestep, so that curve is mostly noise; and its later steps begin where the earlier
ones ended. Here each rate begins anew, with the same seed, and all of them answer the same question: the validation
loss after so many steps, at the same draws, so that small differences count. The suggestion is the largest rate that
still improves on all below it. Short runs favour high rates: in a long one, it is the upper end of what is sensible.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.data.dataset import list_folder, located
from impasto.data.heldout import FEWEST
from impasto.training.native import at_native_size
from impasto.training.optimizers import OPTIMIZERS
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.trainer import train

#: optimizer steps at each rate
STEPS = 40

#: what the recipe's rates are multiplied by, half a decade from one to the next: 1e-4 becomes 3e-6 … 3e-3
FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

#: a loss so many times that before training is one that has got away: higher rates are not tried
AWAY = 1.5


@dataclass(frozen=True)
class Trial:
    """One rate, and the validation loss after the steps; None where the training failed, for the reason `why`."""

    rate: float
    loss: float | None
    why: str = ""


@dataclass(frozen=True)
class Found:
    """All trials from the lowest rate up, the loss before any step, and the rate to take: None if none improves."""

    before: float
    trials: tuple[Trial, ...]
    steps: int

    @property
    def rate(self) -> float | None:
        return choose_rate(self.trials, self.before)

    @property
    def at_the_end(self) -> bool:
        """Whether the highest rate that was tried is the best: a still higher one may be better."""
        return bool(self.trials) and self.rate == self.trials[-1].rate


def choose_rate(trials: Sequence[Trial], before: float) -> float | None:
    """The largest rate that improves on all below it, and on no training at all."""
    best, chosen = before, None
    for trial in trials:
        if trial.loss is not None and trial.loss < best:
            best, chosen = trial.loss, trial.rate
    return chosen


def find_rate(recipe: Recipe, report: Reporter = SILENT, *, steps: int = STEPS,
              factors: Sequence[float] = FACTORS) -> Found:
    """Try rates around the recipe's, in a temporary folder. Raises `UserError`: there is nothing to judge by."""
    _check(recipe)
    recipe = at_native_size(recipe)  # before its keys are all told
    before, trials = math.nan, list[Trial]()
    with tempfile.TemporaryDirectory(prefix="impasto-rates-") as folder:
        for i, factor in enumerate(sorted(factors)):
            rate = float(f"{recipe.train.learning_rate * factor:.3g}")
            short = at_rate(recipe, factor, Path(folder) / str(i), steps)
            loss, why = None, ""
            try:
                with report.phase(f"rate {rate:g}"):
                    loss = train(short, report).validation
            except UserError as error:
                if not _validations(short):  # it has not begun: the rate is not why
                    raise
                why = error.what
            losses = _validations(short)
            if not losses or losses[0] is None:
                raise UserError("no picture is held out, and there is nothing to judge rates by", where="--find-rate",
                                fix="validation.folder=… or validation.fraction=0.1")
            before = losses[0]
            trials.append(Trial(rate, loss if loss is not None and math.isfinite(loss) else None, why))
            if "not finite" in why or (loss is not None and not loss < AWAY * before):
                break
    return Found(before, tuple(trials), steps)


def at_rate(recipe: Recipe, factor: float, folder: Path, steps: int) -> Recipe:
    """The recipe for a few steps at other rates, all of them multiplied by `factor`, constant from the first step."""
    plain = recipe.plain()
    for section in (plain["train"], *plain["method"]):
        for key in ("learning_rate", "text_encoder_learning_rate"):
            if section.get(key) is not None:
                section[key] *= factor
    train_keys: dict[str, Any] = plain["train"]
    train_keys |= {"steps": steps, "epochs": None, "schedule": "constant", "warmup": 0, "restarts": None,
                   "power": None, "rates": {key: rate * factor for key, rate in train_keys["rates"].items()}}
    plain["validation"] |= {"every": steps, "patience": None, "keep_best": False}
    plain["sample"]["every"] = 0
    plain["output"] |= {"dir": str(folder), "save_every": 0, "save_every_epochs": 0, "checkpoint_every": steps,
                        "trackers": [], "push_to": None}
    return make_recipe(plain)


def _check(recipe: Recipe) -> None:
    """Say at once what is known to be in the way."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("rates are tried with one process", where="--find-rate", fix="run it without torchrun")
    entry = OPTIMIZERS.get(recipe.train.optimizer)
    if entry is not None and entry.adaptive:
        raise UserError(f"{recipe.train.optimizer} finds the rate itself", where="--find-rate",
                        fix=f"leave train.learning_rate at {entry.rate:g}")
    data, options = recipe.data, recipe.validation
    none = options.folder is None and options.fraction == 0
    if data is not None and options.folder is None and options.fraction is None:
        counts = [len(list_folder(located(str(one.folder))).pictures) if one.source == "folder" else FEWEST
                  for one in data.sets]
        none = sum(counts) < FEWEST
    if none:
        raise UserError("no picture is held out, and there is nothing to judge rates by", where="--find-rate",
                        fix="validation.folder=… or validation.fraction=0.1")


def _validations(recipe: Recipe) -> list[float | None]:
    """The validation losses in a run's log, from the one before the first step on."""
    path = Path(recipe.output.dir) / "log.jsonl"
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return [entry["validation"] for entry in entries if "validation" in entry]
