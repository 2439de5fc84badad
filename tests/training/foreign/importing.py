"""Importing a made-up file, and looking up what became of a key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from impasto.training.foreign import import_recipe
from impasto.training.foreign.engine import Imported
from impasto.training.recipe import load_recipe, make_recipe


def imported(folder: Path, text: str, name: str = "settings.txt") -> Imported:
    """What the importer makes of a file with that text; checks what holds for every import."""
    (folder / name).write_text(text, encoding="utf-8")
    return checked(folder, import_recipe([folder / name]))


def line(folder: Path, arguments: str, script: str = "train_network.py") -> Imported:
    """What becomes of a command line of kohya's scripts; the base is the same in all."""
    return imported(folder, f"python {script} --pretrained_model_name_or_path=a.ckpt {arguments}")


def checked(folder: Path, found: Imported) -> Imported:
    """The recipe written is valid, and is read back as the same one; no key is told of twice in two ways."""
    recipe = make_recipe(found.tree)
    (folder / "recipe.toml").write_text(found.toml(), encoding="utf-8")
    assert load_recipe(str(folder / "recipe.toml")) == recipe
    assert tomllib.loads(found.toml()) == found.tree
    told = [{each.key for each in part if each.key} for part in
            (found.carried, found.lost, found.needless, found.unknown)] + [set(found.without_effect)]
    assert sum(map(len, told)) == len(set().union(*told)), "a key is told of in two ways"
    return found


def became(found: Imported) -> dict[str, Any]:
    """The recipe's keys, dotted; of several sets of pictures "data.1.folder"."""
    tables = {name: values for section, values in found.tree.items() for name, values in (
        ((f"{section}.{i}", value) for i, value in enumerate(values)) if isinstance(values, list)
        else [(section, values)])}
    return {f"{name}.{key}": value for name, values in tables.items() for key, value in values.items()}


def fate(found: Imported, key: str) -> str:
    """What became of a key of theirs: "carried", "lost", "needless", "unknown", "without effect" or "nothing"."""
    for name in ("carried", "lost", "needless", "unknown"):
        if any(each.key == key for each in getattr(found, name)):
            return name
    return "without effect" if key in found.without_effect else "nothing"


def reason(found: Imported, key: str) -> str:
    """Why a key was not carried over."""
    return next(each.why for each in (*found.lost, *found.needless, *found.unknown) if each.key == key)
