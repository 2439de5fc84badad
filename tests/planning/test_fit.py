"""The cheapest changes after which a forecast fits; on forecasts that are made up."""

from __future__ import annotations

import pytest

from impasto.core.errors import UserError
from impasto.planning.fit import MEANS, changed, fit
from impasto.planning.forecast import Forecast
from impasto.training.recipe import Recipe, make_recipe

GIB = 2**30


def recipe(**sections) -> Recipe:
    return make_recipe({"base": {"path": "mini"}, "data": {"folder": "photos"},
                        "method": {"kind": "lora", "rank": 16}, **sections})


class Made:
    """Forecasts whose activations and states follow from a few settings; what was asked for is counted."""

    def __init__(self, activations: float = 8, states: float = 2, weights: float = 3) -> None:
        self.activations, self.states, self.weights, self.asked = activations, states, weights, 0

    def __call__(self, recipe: Recipe) -> Forecast:
        self.asked += 1
        activations = self.activations * recipe.train.batch_size / (4 if recipe.train.checkpointing else 1)
        weights = self.weights / {"none": 1, "int8": 2, "nf4": 4}[recipe.base.quantize]
        states = self.states * getattr(recipe.method[0], "rank", 16) / 16 / (
            4 if recipe.train.optimizer == "adamw8bit" else 1)
        parts = {"activations": activations, "unet": weights, "optimizer": states}
        return Forecast({name: int(GIB * size) for name, size in parts.items()}, "backward of step 2", 0)


def test_what_fits_is_left_as_it_is() -> None:
    forecast, given = Made(), recipe()
    found = fit(given, 13 * GIB, forecast)
    assert found.fits and found.recipe is given and not found.made and forecast.asked == 1


def test_the_cheapest_change_that_will_do() -> None:
    found = fit(recipe(), 8 * GIB, Made())
    assert found.fits and [one.change.settings for one in found.made] == [{"train.checkpointing": True}]
    assert found.recipe.train.checkpointing and (found.made[0].before, found.made[0].after) == (13 * GIB, 7 * GIB)
    assert found.made[0].change.overrides == ["train.checkpointing=true"]


def test_what_is_not_needed_after_all_is_taken_back() -> None:
    """Micro-batches come after checkpointing; where states alone are too much, neither helps enough to stay."""
    found = fit(recipe(train={"batch_size": 2}), 5 * GIB, Made(activations=0.5, states=5, weights=1))
    assert found.fits and [list(one.change.settings) for one in found.made] == [["train.optimizer"]]


def test_several_together_and_again() -> None:
    found = fit(recipe(train={"batch_size": 4}), 6 * GIB, Made())
    assert found.fits
    assert found.recipe.train.checkpointing and found.recipe.train.batch_size * found.recipe.train.accumulation == 4
    assert found.recipe.train.batch_size == 1


def test_in_no_way_is_an_answer() -> None:
    found = fit(recipe(), GIB // 4, Made())
    assert not found.fits and found.made and found.forecast.peak_bytes > GIB // 4
    assert found.recipe.base.quantize == "nf4" and getattr(found.recipe.method[0], "rank", 0) == 4


def test_defaults_stay_defaults() -> None:
    other = changed(recipe(), {"train.checkpointing": True, "method.0.rank": 8})
    assert "resolution" not in other.data.model_fields_set and other.method[0].rank == 8  # pyright: ignore
    with pytest.raises(UserError):
        changed(recipe(), {"train.no_such": 1})


def test_refused_combinations_are_passed_over() -> None:
    """Fused backward takes no accumulation: where a recipe has one, it is not proposed, and nothing fails."""
    given = make_recipe({"base": {"path": "mini"}, "data": {"folder": "photos"}, "method": {"kind": "full"},
                         "train": {"accumulation": 2}})
    found = fit(given, GIB, Made())
    assert "train.fused_backward" not in {key for one in found.made for key in one.change.settings}
    assert len(MEANS) == len(set(MEANS))
