"""Rates: by step against transformers' and torch's schedules, by path against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from impasto.core.errors import UserError
from impasto.methods.full import Full
from impasto.methods.lora import LoRA
from impasto.training.rates import rate_factor, split_by_path
from impasto.training.sections import TrainOptions
from tests.families.conftest import random_sd1


def options(**keys: Any) -> TrainOptions:
    return TrainOptions.model_validate(keys)


@pytest.mark.parametrize(("keys", "theirs", "arguments"), [
    ({"schedule": "constant"}, "constant_with_warmup", {}),
    ({"schedule": "cosine"}, "cosine", {}),
    ({"schedule": "linear"}, "linear", {}),
    ({"schedule": "cosine_with_restarts"}, "cosine_with_restarts", {"num_cycles": 3}),
    ({"schedule": "cosine_with_restarts", "restarts": 4}, "cosine_with_restarts", {"num_cycles": 4}),
    ({"schedule": "polynomial"}, "polynomial", {"power": 2.0, "lr_end": 0.0}),
    ({"schedule": "polynomial", "power": 0.5}, "polynomial", {"power": 0.5, "lr_end": 0.0}),
], ids=str)
@pytest.mark.parametrize("warmup", [0, 7, 0.1, 0.25])
def test_rates_equal_those_of_transformers(keys: dict, theirs: str, arguments: dict, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    share = transformers.TrainingArguments(output_dir="", use_cpu=True, warmup_steps=warmup).get_warmup_steps(50)
    schedule = transformers.get_scheduler(theirs, optimizer, num_warmup_steps=share, num_training_steps=50,
                                          scheduler_specific_kwargs=arguments)
    made = options(warmup=warmup, **keys)
    for step in range(50):
        assert rate_factor(step, 50, made) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("total", "warmup", "share"), [(50, 0, 0.3), (7, 0, 0.3), (50, 9, 0.2), (50, 0.2, 0.22)])
def test_one_cycle_is_that_of_torch(total: int, warmup: float, share: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, pct_start=share, cycle_momentum=False)
    for step in range(total):
        factor = rate_factor(step, total, options(schedule="one_cycle", warmup=warmup))
        assert factor == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_rex_is_its_formula() -> None:
    made = options(schedule="rex", warmup=10)
    assert rate_factor(5, 110, made) == 0.5
    for step in (10, 35, 60, 109):
        z = (step - 10) / 100  # the share of the budget that is spent: Chen et al. 2021, section 3
        assert rate_factor(step, 110, made) == pytest.approx((1 - z) / (0.5 + (1 - z) / 2))
    assert rate_factor(60, 110, made) > rate_factor(60, 110, options(schedule="linear", warmup=10))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "cosine_with_restarts", "linear", "polynomial", "rex",
                                      "one_cycle"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_short_runs_have_rates_too(schedule: str, warmup: int) -> None:
    for total in (1, 2, 3):
        factors = [rate_factor(step, total, options(schedule=schedule, warmup=warmup)) for step in range(total + 1)]
        assert all(0 <= factor <= 1 for factor in factors)


# --- by path --------------------------------------------------------------------------------------------------------


def lora(**keys: Any) -> list[dict[str, Any]]:
    method = LoRA(LoRA.Options.model_validate({"rank": 2, "targets": ["attention", "text-encoder"], **keys}))
    return method.prepare(random_sd1(), 0)


def rates_by_path(groups: list[dict[str, Any]]) -> dict[str, float | None]:
    return {path: group["lr"] for group in groups for path in group["paths"]}


def test_the_first_pattern_that_is_found_counts() -> None:
    groups = lora(text_encoder_learning_rate=3e-5)
    before = rates_by_path(groups)
    rates = {r"[.]mid_block[.].*up$": 1e-6, r"^unet[.]mid_block": 2e-6, "text_encoder.*layers[.]0[.]": 3e-6}
    made = split_by_path(groups, rates)

    def expected(path: str) -> float | None:
        if path.startswith("unet.mid_block"):
            return 1e-6 if path.endswith("up") else 2e-6
        if path.startswith("text_encoder.") and ".layers.0." in path:
            return 3e-6
        return before[path]

    found = rates_by_path(made)
    assert found == {path: expected(path) for path in before} and {*found.values()} == {1e-6, 2e-6, 3e-6, 3e-5, None}
    assert {id(p): path for g in groups for p, path in zip(g["params"], g["paths"], strict=True)} == \
        {id(p): path for g in made for p, path in zip(g["params"], g["paths"], strict=True)}
    assert len({group["name"] for group in made}) == len(made)


def test_whole_parts_are_named_by_their_own_parameters() -> None:
    base = random_sd1()
    method = Full(Full.Options.model_validate({"parts": ["unet", "vae-decoder"]}))
    groups = method.prepare(base, 0)
    for group in groups:
        for parameter, path in zip(group["params"], group["paths"], strict=True):
            component, _, inside = path.partition(".")
            assert base.components[component].get_parameter(inside) is parameter
    made = split_by_path(groups, {"unet[.]conv_in": 1e-6})
    assert [path for path, rate in rates_by_path(made).items() if rate] == ["unet.conv_in.weight", "unet.conv_in.bias"]


def test_a_group_without_paths_goes_by_its_name() -> None:
    groups = [{"params": [torch.zeros(1), torch.ones(1)], "lr": None, "name": "new words"}]
    (made,) = split_by_path(groups, {"^new words$": 5e-3})
    assert made["lr"] == 5e-3 and len(made["params"]) == 2
    assert split_by_path(groups, {}) is groups


@pytest.mark.parametrize(("rates", "line"), [
    ({r"unet[.]midblock": 1e-6}, r"'unet\[.\]midblock' names nothing that is trained; there is .*unet.mid_block"),
    ({"unet": 1e-6, "mid_block": 1e-6}, "'mid_block' names only what patterns before it have taken; put it before"),
    ({"unet(": 1e-6}, r"'unet\(' is no regular expression"),
])
def test_patterns_without_effect_are_errors(rates: dict[str, float], line: str) -> None:
    with pytest.raises(UserError, match=line):
        split_by_path(lora(), rates)
