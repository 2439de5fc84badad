"""Forecasts of a run's artifact against what trainings of miniatures really leave, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.families.base import Base
from impasto.formats.header import read_header
from impasto.planning.sizes import artifact_bytes, artifact_sizes, shapes
from impasto.training.recipe import BaseOptions, Recipe, make_recipe
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.training.conftest import class_pictures, mini, photos, recipe  # noqa: F401 - fixtures

WORD = {"kind": "textual_inversion", "token": "sks dog", "vectors": 3}

#: what is left -> its method or methods, and output
LEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "kohya": ({"kind": "lora", "rank": 4, "targets": ["all", "text-encoder"]}, {}),
    "fp32": ({"kind": "lora", "rank": 4, "alpha": 3}, {"dtype": "fp32"}),
    "bf16, no metadata": ({"kind": "lora", "rank": 4}, {"dtype": "bf16", "metadata": "none"}),
    "diffusers": ({"kind": "lora", "rank": 4, "alpha": 2, "ranks": {"attn2": 3}}, {"format": "diffusers"}),
    "peft": ({"kind": "lora", "rank": 4, "targets": ["attention", "text-encoder"]}, {"format": "peft"}),
    "pissa": ({"kind": "lora", "rank": 4, "init": "pissa"}, {}),
    "tucker": ({"kind": "lora", "rank": 4, "tucker": True, "targets": ["convolutions"]}, {}),
    "dora": ({"kind": "lora", "rank": 4, "dora": True}, {}),
    "loha": ({"kind": "loha", "rank": 3, "targets": ["all"], "tucker": True}, {}),
    "lokr": ({"kind": "lokr", "rank": 3, "targets": ["all"]}, {}),
    "lokr, peft": ({"kind": "lokr", "full": True, "factor": 4}, {"format": "peft"}),
    "word": (WORD, {}),
    "word, diffusers": (WORD, {"format": "diffusers-embedding"}),
    "words": ({"kind": "textual_inversion", "tokens": {"sks dog": {}, "photo of": {"vectors": 2}}}, {}),
    "pivotal": ([WORD, {"kind": "lora", "rank": 4}], {}),
    "hypernetwork": ({"kind": "hypernetwork", "layer_norm": True, "activation": "mish", "dropout": 0.3}, {}),
    "hypernetwork beside a lora": ([{"kind": "hypernetwork"}, {"kind": "lora", "rank": 4}], {}),
    "full": ({"kind": "full", "parts": ["unet", "text-encoder"]}, {}),
    "delta": ({"kind": "full", "parts": ["attention", "norms", "biases"]}, {"format": "delta"}),
}


def published(family: str) -> Base:
    return shapes(BaseOptions.model_validate({"family": family}))


def check(made: Recipe) -> None:
    """Forecast, train, compare."""
    forecast = artifact_sizes(made)
    outcome = train(made)
    assert outcome.artifact is not None
    found = {file: file.stat().st_size for file in Path(made.output.dir).rglob("*")
             if file.is_file() and (outcome.artifact in file.parents or file.parent == outcome.artifact.parent
                                    and file.suffix in (".safetensors", ".pt"))}
    assert {file: sum(size) for file, size in forecast.items()} == found
    for file, size in forecast.items():
        if file.suffix == ".safetensors":
            assert size.rest == read_header(file).start
    assert artifact_bytes(made) == sum(found.values())


@pytest.mark.parametrize("left", LEFT)
def test_a_forecast_is_exact(recipe: Callable[..., Recipe], left: str) -> None:  # noqa: F811
    methods, output = LEFT[left]
    made = recipe("run", train={"steps": 1}, validation={"fraction": 0}).plain()
    made = make_recipe({**made, "method": methods if isinstance(methods, list) else [methods],
                        "output": {**made["output"], **output}})
    check(made)


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3"])
def test_of_every_family(recipe: Callable[..., Recipe], tmp_path: Path, family: str) -> None:  # noqa: F811
    base = write_checkpoint(tmp_path / "base", family=family, size="mini", layout="diffusers", seed=0)
    told = {"path": str(base)} | ({"prediction": "epsilon"} if family == "sd2" else {})
    check(recipe("run", base=told, train={"steps": 1}, validation={"fraction": 0},
                 method={"rank": 2, "targets": ["attention", "text-encoder"]}))


def test_a_base_can_be_given(recipe: Callable[..., Recipe]) -> None:  # noqa: F811
    """Sizes of the published model, of which there is no file: 16 · 199,296 numbers of two bytes."""
    made = recipe("run", method={"rank": 16, "alpha": 8})
    ((_, size),) = artifact_sizes(made, published("sd1")).items()
    layers = 128
    assert size.tensors == 2 * 16 * 199_296 + 4 * layers  # and an alpha in fp32 for each layer
    assert 50_000 < size.rest < 70_000


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
def test_every_family_has_a_size(recipe: Callable[..., Recipe], family: str) -> None:  # noqa: F811
    base = published(family)
    shapes = [base.parameter(f"{layer}.weight").shape for layer in base.targets("attention")]
    weights = sum(each.numel() for network in base.components.values() for each in network.state_dict().values())
    made = recipe("run", method={"kind": "lora", "rank": 4}, output={"format": "peft"})  # which has factors alone
    assert sum(size.tensors for size in artifact_sizes(made, base).values()) == \
        sum(2 * 4 * (shape[0] + shape[1:].numel()) for shape in shapes)
    folder = make_recipe({"base": {"path": "mini"}, "method": {"kind": "full"}})
    assert artifact_bytes(folder, published(family)) == pytest.approx(2 * weights, rel=0.002)


@pytest.mark.parametrize("base", [{"family": "sd1"}, {"path": "nowhere.safetensors", "family": "sd1", "vae": "no.vae"}])
def test_a_base_that_is_not_there_has_the_size_of_the_published(base: dict[str, Any]) -> None:
    """859.52, 123.06 and 83.65 million weights in 16 bits: a base, or its VAE, that is still to come."""
    made = make_recipe({"base": base, "method": {"kind": "full"}})
    assert artifact_bytes(made) == pytest.approx(2 * (859_520_964 + 123_060_480 + 83_653_863), rel=0.002)


def test_what_cannot_be_saved_is_told_beforehand(recipe: Callable[..., Recipe]) -> None:  # noqa: F811
    made = recipe("run", method={"kind": "loha", "rank": 2}, output={"format": "diffusers"})
    with pytest.raises(UserError, match="which a diffusers file cannot hold"):
        artifact_sizes(made)
