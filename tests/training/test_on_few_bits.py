"""Adapters on a base that is held in few bits: trained, resumed, shown, and told of in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.data.cache import text_encoder_key
from impasto.families.load import load_base
from impasto.methods import METHODS
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.trainer import train
from tests.training.test_trainer import losses

METHODS_ON_TOP: dict[str, dict[str, Any]] = {
    "lora": {"targets": ["attention", "convolutions", "text-encoder"], "dropout": 0.1},
    "loha": {"kind": "loha", "targets": ["all"]},
    "lokr": {"kind": "lokr"},
    "dora": {"dora": True},
}


def held(recipe: Callable[..., Recipe], name: str, kind: str = "nf4", **sections: Any) -> Recipe:
    base = {"quantize": kind, "quantize_text": kind}
    return recipe(name, **{**sections, "base": {**base, **sections.get("base", {})}})


@pytest.mark.parametrize("method", METHODS_ON_TOP)
def test_a_stopped_run_ends_as_one_that_was_not(recipe: Callable[..., Recipe], method: str) -> None:
    options = METHODS_ON_TOP[method]
    straight, stopped = (held(recipe, name, method=options) for name in ("straight", "stopped"))
    train(straight)
    train(stopped, stop_after=3)
    assert train(stopped).resumed_from == 3
    one, other = (load_file(Path(made.output.dir) / "dog.safetensors") for made in (straight, stopped))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)])
def test_losses_are_near_those_of_the_whole_base(recipe: Callable[..., Recipe], kind: str, near: float) -> None:
    whole, less = recipe("whole"), held(recipe, "less", kind)
    train(whole)
    train(less)
    assert losses(less.output.dir) == pytest.approx(losses(whole.output.dir), rel=near)
    assert losses(less.output.dir) != losses(whole.output.dir)


def test_checkpointing_and_bf16_go_with_it(recipe: Callable[..., Recipe]) -> None:
    for precision in ("fp32", "bf16"):
        plain, again = (held(recipe, f"{precision} {on}", train={"precision": precision, "checkpointing": on})
                        for on in (False, True))
        train(plain)
        train(again)
        assert losses(again.output.dir) == pytest.approx(losses(plain.output.dir), rel=1e-4)


def test_the_file_tells_and_previews_are_drawn(recipe: Callable[..., Recipe]) -> None:
    made = held(recipe, "a", sample={"every": 3, "steps": 2, "prompts": ["sks dog"]})
    train(made)
    with safe_open(Path(made.output.dir) / "dog.safetensors", "pt") as file:
        told = file.metadata()
    assert json.loads(told["impasto.quantised"]) == {"quantize": "nf4", "quantize_text": "nf4"}
    assert json.loads(told["impasto.base"]) == load_base(made.base.path).origin()
    assert len(list((Path(made.output.dir) / "previews").iterdir())) == 3
    train(recipe("whole"))
    with safe_open(Path(recipe("whole").output.dir) / "dog.safetensors", "pt") as file:
        assert "impasto.quantised" not in file.metadata()


def test_captions_are_encoded_apart(mini: Path) -> None:
    """States of an encoder that is held otherwise are others, and lie under another key."""
    keys = {kind: text_encoder_key(base, base.fingerprint()) for kind in ("none", "int8", "nf4")
            if (base := load_base(mini, quantize_text=kind))}
    assert len(set(keys.values())) == 3


def test_new_tokens_and_hypernetworks_learn_on_it(recipe: Callable[..., Recipe], mini: Path, photos: Path,
                                                  tmp_path: Path) -> None:
    from tests.training.conftest import tree

    for method in ({"kind": "textual_inversion", "token": "sks dog"}, {"kind": "hypernetwork"}):
        plain = tree(mini, photos, tmp_path / method["kind"], base={"quantize": "int8", "quantize_text": "int8"})
        assert train(make_recipe({**plain, "method": method})).step == 6


@pytest.mark.parametrize(("sections", "line"), [
    ({"method": {"kind": "full"}, "base": {"quantize": "nf4"}}, "base.quantize is for frozen weights, and full trains"),
    ({"method": {"kind": "full"}, "base": {"quantize_text": "int8"}}, "base.quantize_text is for frozen weights"),
    ({"base": {"quantize": "nf4", "adapters": ["a.safetensors"]}}, "held as nf4 would round base.adapters away"),
    ({"base": {"quantize": "nf4", "init": "random"}}, "random weights are there to be trained"),
    ({"base": {"quantize": "int4"}}, "base.quantize"),
])
def test_what_it_does_not_go_with_is_one_line(sections: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        make_recipe({"method": {"kind": "lora"}, **sections, "base": {"path": "x", **sections["base"]}})


def test_full_refuses_such_a_base(mini: Path) -> None:
    cls = METHODS.get("full")
    with pytest.raises(UserError, match="held as int8, of which no weight can train"):
        cls(cls.Options()).check(load_base(mini, quantize="int8"))
