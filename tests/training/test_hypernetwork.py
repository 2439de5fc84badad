"""Runs that train a hypernetwork: what they leave, that they resume exactly, that they learn, beside other methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.formats.adapters import load_adapter
from impasto.training.recipe import Recipe, load_recipe, make_recipe
from impasto.training.reproduce import read_told
from impasto.training.sharing.card import write_card
from impasto.training.sharing.parcel import pack
from impasto.training.trainer import train
from tests.training.conftest import tree

RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def hyper(mini: Path, photos: Path, tmp_path: Path) -> RecipeMaker:
    """A run of six steps that trains a hypernetwork."""

    def made(name: str = "run", method: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        plain = tree(mini, photos, tmp_path / name, **sections)
        return make_recipe(plain | {"method": {"kind": "hypernetwork", **(method or {})}})

    return made


def losses(recipe: Recipe) -> list[float]:
    lines = (Path(recipe.output.dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_a_run_leaves_a_file_of_a1111(hyper: RecipeMaker) -> None:
    made = hyper(output={"save_every": 4, "dtype": "fp32"}, train={"learning_rate": 1e-2})
    outcome = train(made)
    folder = Path(made.output.dir)
    assert outcome.artifact == folder / "dog.pt" and (folder / "dog-000004.pt").exists()
    adapter = load_adapter(folder / "dog.pt")
    assert adapter.family == "sd1" and adapter.hooks[0].widths == (32, 64) and set(adapter.base) >= {"unet"}
    told = read_told(folder / "dog.pt")
    assert told.recipe["method"][0]["kind"] == "hypernetwork" and told.step == 6 and told.base == adapter.base
    table = torch.load(folder / "dog.pt", weights_only=True)
    assert (table["step"], table["name"], table["weight_initialization"]) == (6, "dog", "ZeroLast")


def test_stopped_and_resumed_is_bit_equal_with_dropout(hyper: RecipeMaker) -> None:
    method = {"dropout": 0.3, "activation": "swish", "layer_norm": True}
    whole, stopped = hyper("whole", method), hyper("stopped", method)
    train(whole)
    train(stopped, stop_after=3)
    assert train(stopped).resumed_from == 3
    assert losses(whole) == losses(stopped)
    one, two = (torch.load(Path(recipe.output.dir) / "dog.pt", weights_only=True) for recipe in (whole, stopped))
    assert all(torch.equal(a[key], b[key]) for width in (32, 64)
               for a, b in zip(one[width], two[width], strict=True) for key in a)


def test_dropout_counts_in_training(hyper: RecipeMaker) -> None:
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        train(hyper(name, {"initialisation": "xavier_normal", "dropout": dropout}))
    assert losses(hyper("with")) != losses(hyper("without"))


def test_beside_a_lora_there_are_two_files(mini: Path, photos: Path, tmp_path: Path) -> None:
    plain = tree(mini, photos, tmp_path / "both")
    plain["method"] = [{"kind": "lora", "rank": 2}, {"kind": "hypernetwork", "learning_rate": 1e-3}]
    outcome = train(make_recipe(plain))
    folder = tmp_path / "both"
    assert outcome.artifact == folder / "dog.safetensors"
    assert load_adapter(folder / "dog.safetensors").deltas and load_adapter(folder / "dog-hypernetwork.pt").hooks


def test_formats_that_have_no_place_for_it_are_told_at_once(hyper: RecipeMaker, recipe: RecipeMaker) -> None:
    with pytest.raises(UserError, match="has no place for what hypernetwork leaves"):
        hyper(output={"format": "kohya"})
    with pytest.raises(UserError, match="has no place for what lora leaves"):
        recipe(output={"format": "hypernetwork"})
    hyper(output={"format": "hypernetwork"})


def test_a_width_that_the_model_lacks(hyper: RecipeMaker) -> None:
    with pytest.raises(UserError, match="no attention of this base reads a context of width 768.*it has 32, 64"):
        train(hyper(method={"widths": [768]}))


def test_it_can_be_shared(hyper: RecipeMaker) -> None:
    made = hyper()
    train(made)
    parcel = pack(Path(made.output.dir))
    card = write_card(parcel, "me/dog")
    assert parcel.artifact.name == "dog.pt" and "A hypernetwork" in card and "<hypernet:dog:1>" in card


def test_it_learns_at_a_rate_far_above_a1111_s(tmp_path: Path) -> None:
    """The same draws and beginning on the embedded base, in so few steps; both beginnings at one rate are compared in
    `benchmarks.setups`."""

    def run(name: str, rate: float) -> float:
        made = load_recipe("mini/lora").plain()
        made["method"] = [{"kind": "hypernetwork", "initialisation": "zero_last", "activation": "swish"}]
        made["train"] |= {"steps": 12, "learning_rate": rate, "batch_size": 2, "device": "cpu", "schedule": "constant",
                          "warmup": 2}
        made["sample"]["every"] = 0
        made["data"]["cache"] = str(tmp_path / "cache")
        made["output"] |= {"dir": str(tmp_path / name), "checkpoint_every": 100}
        train(make_recipe(made))
        return sum(losses(make_recipe(made))[-6:]) / 6

    assert run("ours", 2e-3) < 0.9 * run("naive", 1e-5)
