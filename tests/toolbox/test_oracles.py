"""Merged and mixed by peft's and LyCORIS' own code, and by ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from impasto.core.weighted import Weighted
from impasto.deltas.ranks import Wanted
from impasto.formats.adapters import load_adapter
from impasto.toolbox.merge import merge_adapters
from impasto.toolbox.mix import mix
from tests.formats.adapter_cases import UNET_LAYERS
from tests.formats.test_lycoris import kohyas
from tests.formats.test_lycoris import trained as by_lycoris
from tests.formats.test_peft_kinds import CONFIGS

# peft 0.21, transformers 5.24
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Written = Callable[..., Path]
LORA = {"lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 3}),
        "rslora": (peft.LoraConfig, {"r": 4, "lora_alpha": 3, "use_rslora": True})}
#: the Tucker cores of peft's LoHa have no merge of their own that agrees with its forward
KINDS = LORA | {name: config for name, config in CONFIGS.items() if name != "loha-tucker"}


def unet_of(folder: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(str(folder / "unet"))
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def by_peft(folder: Path, name: str, seed: int = 0) -> peft.PeftModel:
    """peft's model of the checkpoint's UNet, its parameters moved from where they begin."""
    kind, options = KINDS[name]
    torch.manual_seed(seed)
    model = peft.get_peft_model(unet_of(folder), kind(target_modules=list(UNET_LAYERS), **options)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def merged(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    merge_adapters(base, [Weighted(str(adapter))], out)
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", KINDS)
def test_merged_weights_are_pefts(name: str, written: Written, tmp_path: Path) -> None:
    base = written("diffusers")
    model = by_peft(base, name)
    model.save_pretrained(str(tmp_path / "a"))
    ours = merged(base, tmp_path / "a", tmp_path / "out")
    theirs = model.merge_and_unload().state_dict()
    plain = unet_of(base).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-5)
    assert sum(not torch.equal(ours[key], plain[key]) for key in plain) == len(UNET_LAYERS)


def test_merged_weights_are_lycoris(written: Written, tmp_path: Path) -> None:
    """LoCon and full differences: LyCORIS 4.1.3 multiplies others by alpha / r twice when it merges."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    for name in ("locon", "full"):
        module = unet_of(written("diffusers"))
        network = by_lycoris(module, name)
        save_file(kohyas({key: tensor.detach().contiguous() for key, tensor in network.state_dict().items()},
                         "lora_unet_"), tmp_path / f"{name}.safetensors")
        network.restore()
        network.merge_to(1.0)
        ours = merged(written("diffusers"), tmp_path / f"{name}.safetensors", tmp_path / name)
        for key, tensor in module.state_dict().items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-5)


def test_a_sum_is_pefts_concatenation(written: Written, tmp_path: Path) -> None:
    model = by_peft(written("diffusers"), "lora")
    kind, options = KINDS["lora"]
    torch.manual_seed(1)
    model.add_adapter("other", kind(target_modules=list(UNET_LAYERS), **options | {"r": 3}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.normal_(std=0.1)
    for adapter in ("default", "other"):
        model.save_pretrained(str(tmp_path), selected_adapters=[adapter])
    first = tmp_path / "default"
    first.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).rename(first / file)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type="cat")
    model.set_adapter("sum")
    theirs = model.merge_and_unload(adapter_names=["sum"]).state_dict()
    plain = unet_of(written("diffusers")).state_dict()
    for wanted in (None, Wanted(rank=7)):
        mix([Weighted(str(first), 0.7), Weighted(str(tmp_path / "other"), 0.4)], tmp_path / "mix.safetensors",
            wanted=wanted, dtype=torch.float32, force=True)
        ours = load_adapter(tmp_path / "mix.safetensors")
        for layer in UNET_LAYERS:
            change = ours.dense(f"unet.{layer}")
            wanted_change = theirs[f"{layer}.weight"] - plain[f"{layer}.weight"]
            torch.testing.assert_close(change.reshape(wanted_change.shape), wanted_change, rtol=1e-4, atol=1e-5)
