"""Each method's miniature recipe teaches the embedded base what it says, and costs it next to nothing that it knew."""

from __future__ import annotations

from pathlib import Path

import pytest

from impasto.evaluation.demo import run_demo
from impasto.evaluation.demo_result import Scores
from impasto.methods import METHODS
from impasto.training.recipe import READY, load_recipe

#: recipe -> the least share of pictures in which what was taught is recognised
TAUGHT = {"lora": 0.7, "loha": 0.7, "lokr": 0.7, "dora": 0.7, "full": 0.7, "dreambooth": 0.7, "pivotal": 0.7,
          "partial": 0.5, "hypernetwork": 0.5, "textual_inversion": 0.6}
#: the least part of the old prompts that the base draws right which it still draws right
KEPT = 0.9


def scores(recipe: str, lesson: str, folder: Path, *overrides: str) -> Scores:
    return run_demo(lesson, folder, recipe_name=f"mini/{recipe}", overrides=["sample.every=0", *overrides]).scores


def test_every_method_has_a_miniature_recipe() -> None:
    kinds = {method.kind for path in (READY / "mini").glob("*.toml") if not path.stem.startswith("pretrain")
             for method in load_recipe(f"mini/{path.stem}").method}
    assert kinds == set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TAUGHT)
def test_what_is_taught_is_learned_and_little_is_forgotten(recipe: str, tmp_path: Path) -> None:
    lesson = "familiar" if recipe == "textual_inversion" else "mascot"
    found = scores(recipe, lesson, tmp_path / "demo")
    assert found.recognised_before.share <= 0.05
    assert found.recognised_after.share >= TAUGHT[recipe]
    assert found.old_after.share >= KEPT * found.old_before.share


@pytest.mark.slow
def test_no_word_teaches_what_the_base_cannot_draw(tmp_path: Path) -> None:
    found = scores("textual_inversion", "mascot", tmp_path / "demo", "method.token=sks mascot",
                   "data.folder=mini:mascot")
    assert found.recognised_after.share <= 0.1
