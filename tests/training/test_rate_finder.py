"""A learning rate found by trial: what is tried, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.training.rate_finder import Trial, at_rate, choose_rate, find_rate
from impasto.training.recipe import Recipe
from tests.training.conftest import draw

RecipeMaker = Callable[..., Recipe]


def test_the_largest_that_improves_on_all_below_it() -> None:
    def trials(*losses: float | None) -> list[Trial]:
        return [Trial(10.0**i, loss) for i, loss in enumerate(losses)]

    assert choose_rate(trials(0.99, 0.9, 0.8, 0.95, None), 1.0) == 100
    assert choose_rate(trials(0.99, 0.9, 0.95, 0.8), 1.0) == 1000
    assert choose_rate(trials(1.1, None), 1.0) is None


def test_all_rates_are_multiplied_and_stay_constant(recipe: RecipeMaker, tmp_path: Path) -> None:
    made = recipe(method={"learning_rate": 1e-3, "text_encoder_learning_rate": 1e-5, "targets": ["all"]},
                  train={"learning_rate": 1e-4, "schedule": "cosine", "warmup": 2, "rates": {"mid": 1e-2}},
                  output={"trackers": [], "save_every": 2})
    plain: dict[str, Any] = at_rate(made, 10, tmp_path, 5).plain()
    method = plain["method"][0]
    assert (method["learning_rate"], method["text_encoder_learning_rate"]) == pytest.approx((1e-2, 1e-4))
    assert plain["train"]["rates"] == pytest.approx({"mid": 0.1}) and plain["train"]["steps"] == 5
    assert plain["train"]["schedule"] == "constant" and plain["train"]["warmup"] == 0
    assert plain["output"]["save_every"] == 0 and plain["train"]["learning_rate"] == pytest.approx(1e-3)


def test_it_finds_one_and_leaves_nothing(recipe: RecipeMaker, tmp_path: Path) -> None:
    """Trained on the picture that is asked about, as good as: a rate that moves the weights beats one that doesn't."""
    folder = tmp_path / "held out"
    folder.mkdir()
    draw(folder / "a.png", 11, (64, 64))
    made = recipe(validation={"folder": str(folder)}, method={"targets": ["all"]}, train={"learning_rate": 1e-3})
    found = find_rate(made, steps=6, factors=(1e-3, 3, 1e7))
    assert [trial.rate for trial in found.trials] == [1e-6, 3e-3, 1e4]
    assert found.rate in (1e-6, 3e-3)
    last = found.trials[-1]
    assert last.loss is None or last.loss > found.before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("sections", "line"), [
    ({}, "no picture is held out"),
    ({"validation": {"fraction": 0}}, "no picture is held out"),
    ({"train": {"optimizer": "prodigy", "learning_rate": 1}}, "prodigy finds the rate itself")])
def test_what_is_in_the_way_is_said_at_once(recipe: RecipeMaker, sections: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        find_rate(recipe(**sections))
