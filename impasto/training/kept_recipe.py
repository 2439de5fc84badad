"""The recipe that a run's directory keeps, and whether today's may go on with the run that is there."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from impasto.core.errors import UserError
from impasto.core.files import atomic_write
from impasto.training.recipe import make_recipe
from impasto.training.run import Run

FILE = "recipe.toml"

#: keys that may change between two sittings of a run: they do not touch the weights. A batch may be divided among
#: more or fewer processes; what it is in all of them together is compared by itself
FREE_KEYS = {"sample", "output", "train.steps", "train.epochs", "train.device", "train.batch_size", "validation.every",
             "validation.patience", "validation.keep_best"}


def compare_recipe(run: Run, plain: dict[str, Any], *, accept: bool = False) -> None:
    """Say in which keys `Recipe.plain()` differs from the recipe that the run of this directory was begun with.

    Raises `UserError`, which names the keys, where those are more than `FREE_KEYS`; with `accept` it is a warning.
    """
    free, binding = _changes(run, plain)
    if free:
        run.report.note(f"goes on with {_few(free)}")
    if binding and not accept:
        raise UserError(f"holds a run with another recipe ({_few(binding)})", where=run.folder,
                        fix="choose another output.dir, put the recipe back, or go on with this one by "
                        "--accept-changes")
    if binding:
        run.report.warn(f"goes on with another recipe, as told ({_few(binding)}): what comes of it is what neither "
                        "of the two would have made alone")


def keep_recipe(run: Run, plain: dict[str, Any], step: int) -> None:
    """Keep `Recipe.plain()` as recipe.toml, which `impasto train` takes as it is, from `step` on.

    Another one than before is a line of the log.
    """
    _, binding = _changes(run, plain)
    if binding:
        run.log(event="recipe changed", step=step, changes=binding)
    with atomic_write(run.folder / FILE) as file:
        tomli_w.dump(without_none(plain), file)


def _changes(run: Run, plain: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What has changed since the run was begun, key by key: of `FREE_KEYS`, and of others."""
    path = run.folder / FILE
    if not path.exists() or not run.checkpoints():
        return [], []
    before, now = _flat(without_none(_renewed(_read(path)))), _flat(without_none(plain))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    told = {key: f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in changed}
    binding = [told[key] for key in changed if not {key, key.split(".")[0]} & FREE_KEYS]
    return [line for line in told.values() if line not in binding], binding


def _few(lines: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(lines[:4]) + (f" and {len(lines) - 4} more" if len(lines) > 4 else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error}), and tells what this run was begun with", where=path,
                        fix="put it back, or choose another output.dir") from error


def _renewed(tree: dict[str, Any]) -> dict[str, Any]:
    """A kept recipe as this version reads it: keys that came since have their defaults. As it is, where this version
    has no such keys any more."""
    try:
        return make_recipe(tree).plain()
    except UserError:
        return tree


def without_none(tree: Any) -> Any:
    """TOML has no null: a key that is not set is absent."""
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return [without_none(item) for item in tree] if isinstance(tree, list) else tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary or list as dotted keys."""
    if isinstance(tree, dict):  # an empty table has no keys
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return {k: v for i, value in enumerate(tree) for k, v in _flat(value, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): tree}
