"""Class pictures beside every method that is registered, and what a recipe says where they cannot be had."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.training.recipe import Recipe
from impasto.training.trainer import train
from tests.training.of_method import EVERY_METHOD, of_method


@pytest.mark.parametrize("kind", EVERY_METHOD)
def test_every_method_takes_class_pictures(kind: str, mini: Path, photos: Path, class_pictures: Path,
                                           tmp_path: Path) -> None:
    def loss(name: str, **sections: Any) -> float:
        found = train(of_method(kind, mini, photos, tmp_path / name, **sections)).loss
        assert found is not None and math.isfinite(found)
        return found

    prior = {"folder": str(class_pictures), "caption": "a photo of a dog", "weight": 0.5}
    assert loss("with", prior=prior) > loss("without")  # they come on top, and their losses are added


def test_captions_of_their_own(recipe: Callable[..., Recipe], class_pictures: Path, tmp_path: Path) -> None:
    """A folder without prior.caption has a caption for each, and says which one lacks it."""
    import shutil

    folder = shutil.copytree(class_pictures, tmp_path / "class")
    for path in sorted(folder.glob("*.png"))[1:]:
        path.with_suffix(".txt").write_text("a dog", encoding="utf-8")
    made = recipe("own", prior={"folder": str(folder)}, train={"steps": 1})
    with pytest.raises(UserError, match=r"has no caption \(0\.txt\)"):
        train(made)
    (folder / "0.txt").write_text("a cat", encoding="utf-8")
    assert math.isfinite(train(made).loss or math.nan)


@pytest.mark.parametrize("prior", [{"weight": 1.0}, {}, {"images": 20}])
def test_a_weight_without_a_class_is_refused(recipe: Callable[..., Recipe], prior: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"prior: say what the class is called \(prior\.caption\), or where its "
                       r"pictures are \(prior\.folder\)") as error:
        recipe(prior=prior)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_is_a_number(recipe: Callable[..., Recipe], weight: float) -> None:
    with pytest.raises(UserError, match=r"prior\.weight"):
        recipe(prior={"caption": "a dog", "weight": weight})
    with pytest.raises(UserError, match=r"data\.loss_weight"):
        recipe(data={"loss_weight": weight})
