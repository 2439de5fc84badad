"""Runs that begin with what others have left: adapters in the base, warm starts; encoders that stop; each resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter
from impasto.formats.header import read_header
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.reproduce import reproduce
from impasto.training.trainer import train

Make = Callable[..., Recipe]


def tensors(path: Path) -> dict[str, Any]:
    return {layer: [term.tensors() for term in terms] for layer, terms in load_adapter(path).deltas.items()}


def equal(one: Path, other: Path) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(a[name], b[name]) for layer in mine for a, b in zip(mine[layer], theirs[layer], strict=True)
        for name in a)


def test_a_run_on_top_of_a_merged_adapter(recipe: Make, tmp_path: Path) -> None:
    first = train(recipe("first", method={"targets": ["attention", "text-encoder"]})).artifact
    assert first is not None
    on_top = {"adapters": [f"{first}:0.5"]}
    second = train(recipe("second", base=on_top)).artifact
    assert second is not None
    told = read_header(second).metadata
    path = recipe("x").base.path
    assert json.loads(told["impasto.base"]) == load_base(path).origin()
    (merged,) = json.loads(told["impasto.merged"])
    assert merged["file"] == first.name and merged["strength"] == 0.5
    assert json.loads(told["impasto.recipe"])["base"]["adapters"] == [f"{first.name}:0.5"]
    assert not equal(second, train(recipe("plain")).artifact or first)
    again = reproduce(second, [f"base.path={path}", f'base.adapters=["{first}:0.5"]'])
    assert not any("adapter" in line for line in (*again.differs, *again.unknown))
    assert any("adapters in the base" in line for line in reproduce(second, ["base.adapters=[]"]).differs)
    train(recipe("resumed", base=on_top), stop_after=3)
    with pytest.raises(UserError, match="the base is not the one"):
        train(recipe("resumed"), accept_changes=True)
    assert equal(second, train(recipe("resumed", base=on_top)).artifact or first)


@pytest.mark.parametrize("method", [
    {"init": "pissa"}, {"dora": True, "kind": "loha"}, {"loraplus_ratio": 16, "max_norm": 0.01},
    {"targets": ["attention", "text-encoder"], "text_encoder_stop": 0.5},
])
def test_a_resumed_run_ends_where_a_whole_one_does(recipe: Make, method: dict[str, Any]) -> None:
    checked = []
    for name, stop in (("whole", None), ("halves", 3)):
        made = recipe(name, method=method, output={"dtype": "fp32"})
        if stop:
            train(made, stop_after=stop)
        train(made)
        checked.append(made)
    states = [next(iter(sorted((Path(made.output.dir) / "checkpoints").glob("*"), reverse=True))) for made in checked]
    assert (states[0] / "state.safetensors").read_bytes() == (states[1] / "state.safetensors").read_bytes()


def test_a_text_encoder_that_has_stopped_is_what_it_was(recipe: Make, tmp_path: Path) -> None:
    made = recipe(method={"targets": ["attention", "text-encoder"], "text_encoder_stop": 2},
                  output={"save_every": 2, "dtype": "fp32"})
    last = train(made).artifact
    assert last is not None
    then, now = tensors(tmp_path / "run" / "dog-000002.safetensors"), tensors(last)
    for layer in now:
        same = all(torch.equal(now[layer][0][name], then[layer][0][name]) for name in ("up", "down"))
        assert same == layer.startswith("text_encoder"), layer


def test_a_warm_start_goes_on_from_a_run(recipe: Make) -> None:
    first = train(recipe("first", output={"dtype": "fp32"})).artifact
    second = train(recipe("second", method={"warm_start": str(first)}, train={"learning_rate": 1e-6},
                          output={"dtype": "fp32"})).artifact
    assert first is not None and second is not None
    before, after = load_adapter(first), load_adapter(second)
    for layer in before.deltas:
        torch.testing.assert_close(after.dense(layer), before.dense(layer), rtol=0, atol=1e-4)
        assert float(before.dense(layer).abs().max()) > 1e-3
    assert json.loads(read_header(second).metadata["impasto.recipe"])["method"][0]["warm_start"] == first.name


def test_a_whole_base_that_is_left_holds_what_was_merged_into_it(recipe: Make) -> None:
    """Also in half precision, where weights that did not train are else written as the base's file has them."""
    first = train(recipe("first")).artifact
    assert first is not None
    path = recipe("x").base.path
    merged = load_base(path, adapters=[f"{first}:1"], dtype=torch.bfloat16).denoiser.state_dict()
    plain = load_base(path, dtype=torch.bfloat16).denoiser.state_dict()
    tree = recipe("whole", base={"adapters": [str(first)]}, train={"precision": "bf16"},
                  output={"dtype": "fp32"}).plain()
    whole = train(make_recipe({**tree, "method": [{"kind": "full", "parts": ["norms"]}]})).artifact
    assert whole is not None
    left = load_base(whole, dtype=torch.bfloat16).denoiser.state_dict()
    changed = [key for key in plain if not torch.equal(plain[key], merged[key])]
    assert changed and all(torch.equal(left[key], merged[key]) for key in changed)


def test_a_delta_is_not_told_from_a_file_without_the_merged_adapters(recipe: Make) -> None:
    tree = recipe("delta", base={"adapters": ["a.safetensors"]}).plain()
    tree["output"]["format"] = "delta"
    with pytest.raises(UserError, match=r"does not hold base\.adapters"):
        make_recipe({**tree, "method": [{"kind": "full"}]})
