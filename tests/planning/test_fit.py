"""The cheapest changes after which a forecast fits; on forecasts that are made up."""

from __future__ import annotations

import pytest

from impasto.core.errors import UserError
from impasto.planning.fit import MEANS, Fit, changed, fit
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
        activations = self.activations * recipe.train.batch_size / (4 if recipe.train.checkpointing is True else 1)
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


class MadeOfAll(Made):
    """As much again for gradients, which a fused backward lets go, and states that may lie elsewhere."""

    def __call__(self, recipe: Recipe) -> Forecast:
        parts = dict(super().__call__(recipe).parts)
        parts["unet"] //= 2 if getattr(recipe.method[0], "weights", "fp32") == "bf16" else 1
        parts["gradients"] = 0 if recipe.train.fused_backward else parts["unet"]
        parts["optimizer"] *= "optimizer" not in recipe.train.offload
        return Forecast(parts, "backward", 0)


def full(**train) -> Recipe:
    return make_recipe({"base": {"path": "mini"}, "data": {"folder": "photos"}, "method": {"kind": "full"},
                        "train": {"checkpointing": True, **train}})


def settings(found: Fit) -> list[dict]:
    return [dict(one.change.settings) for one in found.made]


def test_a_fused_backward_takes_gathered_batches_whole() -> None:
    """It takes no accumulation: micro-batches that were gathered become one, if that is less all the same."""
    fused = {"train.fused_backward": True, "train.clip": 0.0, "train.batch_size": 2, "train.accumulation": 1}
    forecast = MadeOfAll(activations=4, states=6, weights=3)  # 4 of activations for two pictures more than for one
    assert settings(fit(full(accumulation=2), 12 * GIB, forecast)) == [fused]
    assert settings(fit(full(batch_size=2), 12 * GIB, MadeOfAll(activations=4, states=6, weights=3)))[0] == fused
    much = fit(full(accumulation=2), 12 * GIB, MadeOfAll(activations=16, states=6, weights=3))
    assert not much.recipe.train.fused_backward and much.recipe.train.accumulation == 2


def test_states_that_wait_elsewhere_are_whole_ones() -> None:
    """Those in eight bits cannot move; what a later change has anew is told once, with peaks that are true of it."""
    found = fit(full(fused_backward=True, clip=0), 2 * GIB, MadeOfAll(activations=1, states=8, weights=3))
    assert found.fits and found.recipe.train.optimizer == "adamw" and found.recipe.train.offload == ["optimizer"]
    assert settings(found) == [{"method.0.weights": "bf16"},
                               {"train.offload": ["optimizer"], "train.optimizer": "adamw"}]
    assert [(one.before / GIB, one.after / GIB) for one in found.made] == [(11.25, 9.75), (9.75, 1.75)]
    assert found.made[1].change.overrides[0] == 'train.offload=["optimizer"]'
    never = fit(full(fused_backward=True, clip=0), GIB, MadeOfAll(activations=4, states=8, weights=3))
    assert not never.fits and settings(never) == settings(found)


def test_weights_in_16_bits_are_computed_with_in_16() -> None:
    found = fit(full(fused_backward=True, clip=0, precision="fp32"), 4 * GIB, MadeOfAll(8, states=1, weights=3))
    assert settings(found)[0] == {"method.0.weights": "bf16", "train.precision": "bf16"}


def test_a_share_of_blocks_computed_again_becomes_all() -> None:
    found = fit(recipe(train={"checkpointing": 0.25}), 8 * GIB, Made())
    assert settings(found) == [{"train.checkpointing": True}]


def test_no_means_is_asked_twice() -> None:
    assert len(MEANS) == len(set(MEANS))
