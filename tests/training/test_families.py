"""Every method on every family: it trains, saves, loads, and does when merged what it does when attached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.diffusion.densities import Uniform
from impasto.families import FAMILIES
from impasto.families.apply import apply
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.methods import METHODS
from impasto.training.recipe import make_recipe
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.training.conftest import tree
from tests.training.of_method import EVERY_METHOD, NEEDED, of_method

#: formats that hold what a method leaves behind, beside those of all families: of one text encoder alone
FORMATS = {
    "lora": ("kohya", "comfyui", "onetrainer", "diffusers", "peft"), "loha": ("kohya", "comfyui", "onetrainer", "peft"),
    "lokr": ("kohya", "comfyui", "onetrainer", "peft"), "textual_inversion": ("kohya", "webui-embedding"),
    "hypernetwork": ("hypernetwork",),
}
#: what a format cannot hold of it: kohya's file, out of which it is read, has the three layers of SD 3's attention as
#: one, whose rows no Kronecker product makes
WHOLE = {("sd3", "lokr", "peft")}
ENDINGS = {"peft": "", "hypernetwork": ".pt"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_checkpoint(folder / family, family, layout="diffusers") for family in FAMILIES}


@torch.no_grad()
def said(base: Base) -> Tensor:
    """What the base predicts of fixed latents and a caption with the token that is taught."""
    x = torch.randn(2, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    time = base.process.times(torch.tensor([0.1, 0.8]), Uniform())
    return base.predict(x, time, base.condition(base.encode_text(["a photo of sks dog", "a cat"])))


@pytest.mark.parametrize("kind", EVERY_METHOD)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_trains_saves_and_loads(bases, photos, tmp_path, family, kind) -> None:
    made = of_method(kind, bases[family], photos, tmp_path / "run",
                     train={"steps": 3, "learning_rate": 1e-2}, output={"dtype": "fp32"})
    if (why := FAMILIES.get(family).refuses.get(kind)) is not None:
        with pytest.raises(UserError, match=f"a base of the family {family} cannot be trained so: {why}"):
            train(made)
        return
    artifact = train(made).artifact
    assert artifact is not None
    if METHODS.get(kind).in_place:
        trained, plain = load_base(artifact), load_base(bases[family])
        assert trained.family == family and not torch.allclose(said(trained), said(plain), atol=1e-5)
        assert set(trained.components) == set(plain.components)
        return
    adapter, base = load_adapter(artifact), load_base(bases[family])
    assert adapter.family == family
    before = said(base)
    with apply(base, adapter):
        attached = said(base)
    assert not torch.allclose(attached, before, atol=1e-5)
    assert torch.equal(said(base), before)
    if adapter.deltas:
        merged = load_base(bases[family], adapters=[str(artifact)])
        torch.testing.assert_close(said(merged), attached, rtol=1e-4, atol=1e-5)
    for format in FORMATS[kind]:
        if (family, kind, format) in WHOLE:
            with pytest.raises(UserError, match="holds a full difference, which a peft file cannot hold"):
                saved(adapter, tmp_path, format)
            continue
        again = load_adapter(saved(adapter, tmp_path, format), family=family)
        with apply(base, again):
            torch.testing.assert_close(said(base), attached, rtol=1e-4, atol=1e-5)


def saved(adapter: Adapter, folder: Path, format: str) -> Path:
    out = folder / f"again-{format}{ENDINGS.get(format, '.safetensors')}"
    save_adapter(adapter, out, format=format, dtype=torch.float32)
    return out


def test_every_method_has_its_needs() -> None:
    assert NEEDED.keys() <= set(METHODS)
    assert all(FAMILIES.get(family).refuses.keys() <= set(METHODS) for family in FAMILIES)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_learns(bases, photos, class_pictures, tmp_path, family) -> None:
    """The loss on held-out pictures, at the same noise each time, falls in a short training."""
    made = make_recipe(tree(
        bases[family], photos, tmp_path / "run", method={"kind": "lora", "rank": 8, "targets": ["all"]},
        train={"steps": 60, "learning_rate": 5e-3}, validation={"every": 60, "folder": str(class_pictures)},
        output={"checkpoint_every": 100}))
    train(made)
    lines = (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [entry["validation"] for entry in map(json.loads, lines) if "validation" in entry]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_everything_that_words_name_is_reached(bases, photos, tmp_path, family, kind) -> None:
    """No layer goes without a gradient: SDXL's first text encoder has one that nothing computes with, SD 3 another."""
    own = {"targets": ["all", "attention", "text-encoder"]} if kind == "lora" else {"parts": ["unet", "text-encoder"]}
    if family == "sd3" and kind == "full":
        own = {"parts": ["transformer", "text_encoder", "text_encoder_2"]}
    made = tree(bases[family], photos, tmp_path / "run", train={"steps": 5, "learning_rate": 1e-3},
                output={"checkpoint_every": 100})
    made["method"] = {"kind": kind, **own}
    assert train(make_recipe(made)).step == 5


def test_an_adapter_tells_what_its_base_predicts(bases, photos, tmp_path) -> None:
    for prediction, word in (("epsilon", "epsilon"), ("v_prediction", "v")):
        made = of_method("lora", bases["sd2"], photos, tmp_path / word, base={"prediction": prediction})
        with safe_open(train(made).artifact, "pt") as file:
            told = file.metadata()
        assert told["modelspec.prediction_type"] == word and told["ss_v2"] == "True"
