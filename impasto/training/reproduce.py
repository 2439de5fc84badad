"""From an artifact back to the recipe that made it, and what is not the same here and now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.data.pictures import data_fingerprint, pictures_of
from impasto.data.sets import label
from impasto.data.shards.access import is_url
from impasto.families.fingerprint import fingerprint
from impasto.families.load import locate
from impasto.families.merged import content
from impasto.formats.adapters import load_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.header import read_header
from impasto.formats.probe import is_pickle
from impasto.training.environment import choose_device, describe, differences
from impasto.training.overrides import apply_override
from impasto.training.recipe import Recipe, make_recipe


@dataclass(frozen=True)
class Reproduction:
    """A recipe that was rebuilt, and what is to be known before it is run."""

    recipe: Recipe
    step: int  # of the artifact
    differs: list[str]  # lines: what is other than when the artifact was made
    unknown: list[str]  # lines: what could not be compared


def reproduce(artifact: Path, settings: Sequence[str] = ()) -> Reproduction:
    """The recipe in an artifact's metadata, with `section.key=value` settings, compared with this machine.

    Artifacts hold the last parts of paths alone: say where base and pictures are by settings, or run it where
    they lie. Raises `UserError` for a file without such metadata.
    """
    tree, base, data, environment, step, merged = read_told(artifact)
    for setting in settings:
        apply_override(tree, setting)
    recipe = make_recipe(tree, where=artifact)
    found = Reproduction(recipe, step, [], [])
    total = recipe.train.steps
    if total is not None and step != total:
        found.differs.append(f"the artifact is of step {step}, and the recipe goes to {total}")
    _compare_base(recipe, base, found)
    _compare_merged(recipe, merged, found)
    _compare_data(recipe, data, found)
    found.differs.extend(differences(environment, describe(choose_device("auto"))))
    return found


class Told(NamedTuple):
    """What an artifact tells of how it was made."""

    recipe: dict[str, Any]  # places in it are cut to their last parts
    base: dict[str, str]  # fingerprint by component
    data: str  # fingerprint
    environment: dict[str, str]
    step: int
    merged: list[str]  # digest of each adapter that was in the base


def read_told(artifact: Path) -> Told:
    """What the file or folder tells. Raises `UserError` where it tells nothing."""
    told = _metadata(_file(artifact))
    try:
        return Told(json.loads(told["impasto.recipe"]), json.loads(told["impasto.base"]), told["impasto.data"],
                    json.loads(told["impasto.environment"]), int(told["impasto.step"]),
                    [each["hash"] for each in json.loads(told.get("impasto.merged", "[]"))])
    except (KeyError, ValueError, TypeError):
        raise UserError("does not tell how it was made", where=artifact,
                        fix="only artifacts of this program do, and those with output.metadata=none don't") from None


def _metadata(file: Path) -> dict[str, str]:
    """What stands in a file's header, or, in a pickle, where its format has it."""
    if not is_pickle(file):
        return read_header(file).metadata
    adapter = load_adapter(file)
    return {**adapter.metadata, "impasto.base": json.dumps(adapter.base)}


def _file(artifact: Path) -> Path:
    """The file that holds an artifact's metadata: itself, or the first one of a folder."""
    if artifact.is_dir():
        files = sorted(artifact.rglob("*.safetensors"))
        if not files:
            raise UserError("is a folder without weights", where=artifact)
        return files[0]
    return artifact


def _compare_base(recipe: Recipe, before: dict[str, str], found: Reproduction) -> None:
    if recipe.base.init == "random":
        return
    try:
        checkpoint = open_checkpoint(locate(recipe.base.place))
        vae = open_checkpoint(locate(recipe.base.vae)) if recipe.base.vae else checkpoint
    except UserError as error:
        found.unknown.append(f"the base: {error.what}; say where it is: base.path=…")
        return
    for name, digest in before.items():
        source = vae if name == "vae" else checkpoint
        if name not in source.components:
            found.differs.append(f"the base has no {name}")
        elif fingerprint(source, name) != digest:
            found.differs.append(f"the base's {name} is another one")


def _compare_merged(recipe: Recipe, before: list[str], found: Reproduction) -> None:
    for adapter, digest in zip_longest(recipe.base.adapters, before, fillvalue=""):
        path = Path(Weighted.parse(adapter).path) if adapter else None
        if path is None or not digest:
            found.differs.append("there are more or fewer adapters in the base")
        elif not path.exists():
            found.unknown.append(f"{path.name}, an adapter in the base: say where it is: base.adapters=…")
        elif content(path) != digest:
            found.differs.append(f"{path.name}, an adapter in the base, is another one")


def _compare_data(recipe: Recipe, before: str, found: Reproduction) -> None:
    data, prior = recipe.data, recipe.prior
    if data is None or all(one.source == "world" for one in data.sets):
        return
    if prior is not None and prior.folder is None:
        found.unknown.append("the class pictures: they are drawn by the run itself")
        return
    if any(is_url(name) for one in data.sets for name in one.shards or ()):
        found.unknown.append("the pictures: they are on a web server, and would have to be fetched to be compared")
        return
    try:
        now = pictures_of(data, prior, recipe.validation, recipe.train.seed)
    except UserError as error:
        key = "shards" if data.sets[0].source == "shards" else "folder"
        found.unknown.append(f"the pictures: {error.what}; say where they are: {label(0, data)}.{key}=…")
        return
    if data_fingerprint(data, [now.learned, *([] if now.of_class is None else [now.of_class])]) != before:
        found.differs.append("the pictures, their captions or their cuts are others")

