"""docs/recipes.md, written from the recipe's own keys: `python -m impasto.training.reference > docs/recipes.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pydantic
from pydantic_core import PydanticUndefined

from impasto.methods import METHODS
from impasto.objectives import OBJECTIVES
from impasto.training.optimizers import OPTIMIZERS, SHARED
from impasto.training.recipe import (
    BaseOptions,
    DataOptions,
    OutputOptions,
    PriorOptions,
    SampleOptions,
    TrainOptions,
    ValidationOptions,
)

#: a bar inside a table's cell
BAR = "\\|"

SECTIONS: list[tuple[str, str, type[pydantic.BaseModel]]] = [
    ("base", "the checkpoint", BaseOptions),
    ("data", "the pictures; `[[data]]`, several times, for several sets", DataOptions),
    ("prior", "class pictures; leave the section out to do without", PriorOptions),
    *((f'method] kind = "{name}"', "what is trained", METHODS.get(name).Options) for name in METHODS),
    *((f'objective] kind = "{name}"', "what is minimised", OBJECTIVES.get(name).Options) for name in OBJECTIVES),
    ("train", "the loop", TrainOptions),
    ("validation", "pictures that are held out", ValidationOptions),
    ("sample", "previews", SampleOptions),
    ("output", "where it goes", OutputOptions),
]


def reference() -> str:
    """The whole page, Markdown."""
    lines = ["# Recipe keys", "",
             "Any of them may stand in a TOML file, or as `section.key=value` on the command line; "
             "`data.1.key=value` of several sets, `method.1.key=value` of several methods. `section.key=` takes a "
             "recipe's own setting away."]
    for name, what, model in SECTIONS:
        title = f"[{name}" if "]" in name else f"[{name}]"
        lines += ["", f"## `{title}` {what}", "", "| key | default | |", "|---|---|---|", *_rows(model)]
        if model is TrainOptions:
            lines += ["", "| `optimizer` | extra | `learning_rate` | `betas` | `weight_decay` | `eps` | |",
                      "|---|---|---|---|---|---|---|", *_optimizers()]
    return "\n".join(lines) + "\n"


def _rows(model: type[pydantic.BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name != "kind":
            default = "needed" if field.default is PydanticUndefined and field.default_factory is None else \
                f"`{json.dumps(field.get_default(call_default_factory=True))}`"
            told = ("" if default == "`null`" else default, str(field.description))
            yield f"| `{name}` | {' | '.join(each.replace('|', BAR) for each in told)} |"


def _optimizers() -> Iterator[str]:
    for name, entry in OPTIMIZERS.items():
        shared = (json.dumps(entry.settings[key]) if key in entry.settings else "" for key in SHARED)
        yield f"| `{name}` | {entry.extra} | {' | '.join([f'{entry.rate:g}', *shared])} | {entry.about} |"


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.write(reference())
