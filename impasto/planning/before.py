"""A look ahead before a run: does it fit the memory that is free here, and if not, what would."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import torch

from impasto.core.errors import UserError
from impasto.core.progress import Reporter
from impasto.planning.fit import TOUCHED, changed, fit
from impasto.planning.forecast import GIB, Forecast
from impasto.planning.memory import forecast
from impasto.planning.time import about, seconds_per_step, speed_here
from impasto.training.environment import Precision, choose_device
from impasto.training.kept_recipe import FILE
from impasto.training.optimizers import choose
from impasto.training.recipe import Recipe


def look_ahead(recipe: Recipe, report: Reporter) -> tuple[Recipe, Forecast | None]:
    """The recipe to train, and what it will take on this machine's device.

    On a GPU, or where `train.fit` says so: a run that will not fit is told of in a line, and with `train.fit` changed
    so that it does. One that goes on keeps the changes that it began with. Raises what the trainer would.
    """
    device = choose_device(recipe.train.device)
    if device.type != "cuda" and not recipe.train.fit:
        return recipe, None
    if recipe.train.fit:
        recipe = as_begun(recipe)
    with report.phase("looking ahead"):
        found, room = forecast(recipe, device.type), free(device)
    if needed(found) <= room:
        report.note(f"needs about {needed(found) / GIB:.1f} of {room / GIB:.1f} GiB that are free"
                    + _time(recipe, found, device))
        return recipe, found
    lacks = f"needs about {needed(found) / GIB:.1f} GiB, and {room / GIB:.1f} are free"
    if not recipe.train.fit:
        report.warn(f"this run {lacks}: impasto plan says what to change, and train.fit=true changes it")
        return recipe, found

    def here(other: Recipe) -> Forecast:
        choose(other.train, device)  # an optimizer whose library is missing is no means
        return forecast(other, device.type)

    better = fit(recipe, room + found.parts.get("context", 0), here, found, report)
    for one in better.made:
        report.note(f"so that it fits: {shlex.join(one.change.overrides)} ({one.change.costs})")
    if not better.fits:
        raise UserError(f"{lacks}, and no change brings it below {needed(better.forecast) / GIB:.1f} GiB",
                        where="train.fit", fix="take a smaller base, or data.resolution, or a card with more memory")
    return better.recipe, better.forecast


def _time(recipe: Recipe, found: Forecast, device: torch.device) -> str:
    """How long it will take, where a speed is known of the device and the recipe counts steps."""
    speed = speed_here(device, Precision.choose(recipe.train.precision, device).name)
    seconds = None if speed is None else seconds_per_step(found, speed)
    if speed is None or seconds is None:
        return ""
    steps = recipe.train.known_steps
    whole = f", {about(seconds * steps)} for {steps} steps" if steps else ""
    return f"; about {about(seconds)} a step{whole} ({speed.origin})"


def as_begun(recipe: Recipe) -> Recipe:
    """The recipe with what was changed when its run began, if it has begun: the two must be one."""
    kept = Path(recipe.output.dir) / FILE
    if not kept.exists():
        return recipe
    tree, settings = tomllib.loads(kept.read_text(encoding="utf-8")), dict[str, Any]()
    for section, key in TOUCHED:
        if section == "method":
            for number, method in enumerate(tree.get("method", [])[:len(recipe.method)]):
                settings |= {f"method.{number}.{key}": method[key]} if key in method else {}
        elif isinstance(table := tree.get(section), dict) and key in table:
            settings[f"{section}.{key}"] = table[key]
    return changed(recipe, settings)


def needed(found: Forecast) -> int:
    """Bytes that a process which has begun to use the device will still ask for."""
    return found.peak_bytes - found.parts.get("context", 0)


def free(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
