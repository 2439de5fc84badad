"""The original names of SDXL's layers against diffusers' translation of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.formats import original
from impasto.formats.adapters import load_adapter, save_adapter


def factors(name: str, number: float = 1.0) -> dict[str, torch.Tensor]:
    """A LoRA of rank 1 with a number in it."""
    return {f"{name}.lora_up.weight": torch.full((2, 1), number), f"{name}.lora_down.weight": torch.ones(1, 3),
            f"{name}.alpha": torch.tensor(1.0)}


def test_names_are_those_that_diffusers_makes_of_them() -> None:
    """Of the base's attention and feed-forward layers, all at once."""
    flats = [name.replace(".", "_") for path, name in original.originals("sdxl").items()
             if ".transformer_blocks." in path and "norm" not in path]
    state: dict[str, torch.Tensor] = {}
    for number, flat in enumerate(flats):
        state |= factors(f"lora_unet_{flat}", float(number))
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(
        _maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2)))
    found = {int(tensor[0, 0]): key for key, tensor in theirs.items() if key.endswith((".up.weight", "lora_B.weight"))}
    assert len(found) == len(flats) == 700
    for number, flat in enumerate(flats):
        name = found[number].removeprefix("unet.").replace(".processor", "")
        name = name.partition(".lora")[0].partition("_lora")[0]
        ours = original.flat_paths()[flat]
        assert name in (ours, ours.removesuffix(".0")), (flat, found[number])


def test_there_and_back_for_every_layer(tmp_path: Path) -> None:
    layers = {f"unet.{path}": (LowRank.from_factors(torch.randn(2, 1), torch.randn(1, 3)),)
              for path in original.originals("sdxl") if "norm" not in path}
    adapter = Adapter(layers, family="sdxl")
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    keys = load_file(tmp_path / "a.safetensors")
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in keys
    assert "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0.alpha" in keys
    assert "lora_unet_label_emb_0_0.alpha" in keys and not any("down_blocks" in key for key in keys)
    found = load_adapter(tmp_path / "a.safetensors")
    assert set(found.layers) == set(layers) and found.family == "sdxl"


def test_no_name_means_two_layers() -> None:
    for family in ("sd1", *original.SDXL):
        named = original.originals(family)
        assert len({*named.values()}) == len(named) > 250
        assert all(original.paths()[name] == path for path, name in named.items())
    assert len(original.flat_paths()) == len(original.paths())


def test_both_spellings_are_read(tmp_path: Path) -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    for name in (path.replace(".", "_"), original.originals("sdxl")[path].replace(".", "_")):
        save_file(factors(f"lora_unet_{name}"), tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
        assert load_adapter(tmp_path / "a.safetensors").layers == [f"unet.{path}"]
    save_file(factors("lora_unet_input_blocks_44_1_proj_in"), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="names no layer of a UNet in its authors' names"):
        load_adapter(tmp_path / "a.safetensors")
