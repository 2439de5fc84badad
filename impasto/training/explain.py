"""Each setting of a recipe: its value, where that comes from, and why it is what it is. Nothing is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from impasto.data.options import DataOptions
from impasto.data.sets import DataSets
from impasto.methods import METHODS
from impasto.objectives import OBJECTIVES
from impasto.training.overrides import apply_override
from impasto.training.recipe import Recipe, load_recipe, read_tree

Origin = Literal["recipe", "command line", "default"]

#: stands for every value of the file while overrides are applied: what is still there afterwards is the file's
_FROM_FILE = object()


class _Table(dict[str, Any]):
    """A table of the file: a section, or a value such as `ranks`."""


@dataclass(frozen=True)
class Setting:
    """One key: its value as JSON has it, where that comes from, and the key's own description."""

    key: str
    value: Any
    origin: Origin
    why: str


@dataclass(frozen=True)
class Part:
    """One section: its name ("train", "method.1", "data.0" of several), what it is, its settings in order.

    A section that the recipe does without has none.
    """

    name: str
    about: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Explanation:
    """A checked recipe, setting by setting."""

    path: Path
    parts: tuple[Part, ...]

    def plain(self) -> dict[str, Any]:
        """All of it, JSON-able: a list, in the order of the sections."""
        return {"recipe": str(self.path), "settings": [
            {"section": part.name, "key": each.key, "value": each.value, "from": each.origin, "why": each.why}
            for part in self.parts for each in part.settings]}


def explain(name: str, overrides: Sequence[str] = ()) -> Explanation:
    """Every setting of the recipe of that name under `overrides`. Raises `UserError` as `load_recipe` does."""
    recipe = load_recipe(name, overrides)
    path, tree = read_tree(name)
    origins = _marked(tree)
    for override in overrides:
        apply_override(origins, override)
    return Explanation(path, tuple(_parts(recipe, origins)))


def _parts(recipe: Recipe, origins: dict[str, Any]) -> Iterator[Part]:
    for name, field in Recipe.model_fields.items():
        section = getattr(recipe, name)
        if name == "method":
            given = origins["method"] if isinstance(origins["method"], list) else [origins["method"]]
            for number, (method, own) in enumerate(zip(section, given, strict=True)):
                about = _first_line(METHODS.get(method.kind))
                yield _part(f"method.{number}" if len(section) > 1 else "method", about, method, own)
        elif isinstance(section, DataSets):
            for number, (one, own) in enumerate(zip(section.sets, origins["data"], strict=True)):
                yield _part(f"data.{number}", _after_colon(_first_line(type(one))), one, own)
        elif name == "objective":
            yield _part(name, _first_line(OBJECTIVES.get(section.kind)), section, origins.get(name, {}))
        elif section is None:
            model = next(kind for kind in getattr(field.annotation, "__args__", ()) if kind is not type(None))
            yield Part(name, _after_colon(_first_line(model)), ())
        else:
            given = origins.get(name, {})
            own = given[0] if isinstance(given, list) else given
            yield _part(name, _after_colon(_first_line(type(section))), section, own)


def _part(name: str, about: str, section: pydantic.BaseModel, given: dict[str, Any]) -> Part:
    values = section.model_dump(mode="json")
    if isinstance(section, DataOptions) and "resolution" not in given:
        values["resolution"] = None  # the base's own: see `native`
    return Part(name, about, tuple(
        Setting(key, values[key], _origin(given, key), about if key == "kind" else str(field.description))
        for key, field in type(section).model_fields.items()))


def _origin(given: dict[str, Any], key: str) -> Origin:
    if key not in given:
        return "default"
    return "recipe" if _as_it_was(given[key]) else "command line"


def _as_it_was(value: Any) -> bool:
    """Whether no override has touched a value of the file."""
    return value is _FROM_FILE or isinstance(value, _Table) and all(map(_as_it_was, value.values()))


def _marked(node: Any) -> Any:
    """The tree with `_FROM_FILE` in place of each value; sections, and lists of them, stay what they are."""
    if isinstance(node, dict):
        return _Table({key: _marked(value) for key, value in node.items()})
    if isinstance(node, list) and node and all(isinstance(item, dict) for item in node):
        return [_marked(item) for item in node]
    return _FROM_FILE


def _first_line(thing: type) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _after_colon(line: str) -> str:
    """What a section's docstring says behind the section's name."""
    return line.partition("`: ")[2] or line
