"""From an artifact back to its recipe, and what differs now."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.training import reproduce as module
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.reproduce import reproduce
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.cli.running import impasto
from tests.training.conftest import draw

RecipeMaker = Callable[..., Recipe]


def places(recipe: Recipe) -> list[str]:
    assert recipe.data is not None
    return [f"base.path={recipe.base.path}", f"data.folder={recipe.data.folder}",
            f"output.dir={recipe.output.dir}-again"]


def test_the_recipe_comes_back_and_makes_the_same_file(recipe: RecipeMaker) -> None:
    made = recipe()
    artifact = train(made).artifact
    assert artifact is not None
    found = reproduce(artifact, places(made))
    assert found.differs == [] and found.unknown == [] and found.step == 6
    again = train(found.recipe).artifact
    assert again is not None
    a, b = load_file(artifact), load_file(again)
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def test_what_differs_is_named(recipe: RecipeMaker, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                               ) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(photos, folder)
    made = recipe(data={"folder": str(folder)})
    artifact = train(made).artifact
    assert artifact is not None
    draw(folder / "1.png", 77, (64, 64))
    monkeypatch.setattr(module, "describe", lambda device: {"torch": "0.1"})
    other = made.base.path.replace("mini.safetensors", "other.safetensors")
    write_checkpoint(other, seed=9)
    found = reproduce(artifact, [*places(made), f"base.path={other}"])
    assert any("pictures" in line for line in found.differs)
    assert any("base's unet is another one" in line for line in found.differs)
    assert any("torch was" in line for line in found.differs)


def test_what_is_not_here_is_not_compared(recipe: RecipeMaker) -> None:
    artifact = train(recipe()).artifact
    assert artifact is not None
    found = reproduce(artifact)
    assert len(found.unknown) == 2 and "base.path=" in found.unknown[0] and "data.folder=" in found.unknown[1]


def test_files_that_do_not_tell(recipe: RecipeMaker, mini: Path) -> None:
    artifact = train(recipe(output={"metadata": "none"})).artifact
    assert artifact is not None
    for file in (artifact, mini):
        with pytest.raises(UserError, match="does not tell how it was made"):
            reproduce(file)


def test_the_verb_writes_a_recipe_that_train_takes(recipe: RecipeMaker, tmp_path: Path) -> None:
    artifact = train(recipe()).artifact
    done = impasto("reproduce", artifact, *places(recipe()), "-o", tmp_path / "again.toml", OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "differs" in done.stdout
    assert make_recipe(tomllib.loads((tmp_path / "again.toml").read_text())).train.steps == 6
    told = impasto("reproduce", artifact, "--json")
    assert json.loads(told.stdout)["step"] == 6
