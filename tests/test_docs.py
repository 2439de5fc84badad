"""The documents say what is so: recipe keys, and the README's recipe."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from impasto.training.recipe import make_recipe
from impasto.training.reference import reference

ROOT = Path(__file__).parent.parent


def test_the_reference_of_recipe_keys_is_current() -> None:
    """Written by `python -m impasto.training.reference > docs/recipes.md`."""
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == reference()


def test_the_recipe_in_the_readme_is_valid() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        make_recipe(tomllib.loads(block))


def test_the_verbs_in_the_readme_exist() -> None:
    from impasto.cli.app import VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^impasto (\w+)", text, re.MULTILINE)) <= set(VERBS)
