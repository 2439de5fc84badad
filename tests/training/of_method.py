"""A short recipe for each method that is registered: what holds of all of them is tested on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from impasto.methods import METHODS
from impasto.training.recipe import Recipe, make_recipe
from tests.training.conftest import tree

#: what a method needs beside its kind
NEEDED: dict[str, dict[str, Any]] = {
    "textual_inversion": {"token": "sks dog"},
}

EVERY_METHOD = sorted(METHODS)


def of_method(kind: str, mini: Path, photos: Path, out: Path, **sections: Any) -> Recipe:
    """Two steps by that method."""
    made = tree(mini, photos, out, **{**sections, "train": {"steps": 2, **sections.get("train", {})}})
    made["method"] = {"kind": kind, **NEEDED.get(kind, {})}
    return make_recipe(made)
