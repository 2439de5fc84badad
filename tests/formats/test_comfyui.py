"""ComfyUI's generic names: what is written and read, and the spellings that others use there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.detect import detect
from tests.formats.adapter_cases import dense, random_adapter, worst
from tests.formats.kind_cases import adapter_of_kind

QUERY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1"


def test_keys_are_original_names(tmp_path: Path) -> None:
    save_adapter(random_adapter(), tmp_path / "a.safetensors", format="comfyui")
    keys = load_file(tmp_path / "a.safetensors").keys()
    assert {f"{QUERY}.lora_up.weight", f"{QUERY}.alpha", "diffusion_model.out.2.lora_down.weight",
            "diffusion_model.middle_block.2.out_layers.3.lora_up.weight", f"{TEXT}.lora_up.weight"} <= keys
    found = detect(tmp_path / "a.safetensors")
    assert (found.kind, found.layout, found.family) == ("adapter", "comfyui", "sd1")


@pytest.mark.parametrize("kind", ["loha", "lokr", "dense", "dora", "lora-tucker"])
def test_every_kind_comes_back(kind: str, tmp_path: Path) -> None:
    adapter = adapter_of_kind(kind, norms=True)
    for format in ("comfyui", "kohya"):
        save_adapter(adapter, tmp_path / f"{format}.safetensors", format=format, dtype=torch.float32)
    one, other = (load_adapter(tmp_path / f"{format}.safetensors") for format in ("comfyui", "kohya"))
    assert set(one.layers) == set(other.layers)
    for layer in one.layers:
        for mine, theirs in zip(one.deltas[layer], other.deltas[layer], strict=True):
            mine_, theirs_ = mine.tensors(), theirs.tensors()
            assert mine_.keys() == theirs_.keys() and all(torch.equal(mine_[name], theirs_[name]) for name in mine_)


@pytest.mark.parametrize("down, up", [("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight"),
                                      ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")])
def test_other_spellings_of_a_lora(down: str, up: str, tmp_path: Path) -> None:
    save_adapter(random_adapter(), tmp_path / "a.safetensors", format="comfyui", dtype=torch.float32)
    tensors = {key.replace("lora_down.weight", down).replace("lora_up.weight", up): tensor
               for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    save_file(tensors, tmp_path / "b.safetensors")
    assert worst(dense(load_adapter(tmp_path / "b.safetensors")), dense(random_adapter())) < 1e-6


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    pair = {f"{QUERY}.lora_up.weight": torch.ones(2, 1), f"{QUERY}.lora_down.weight": torch.ones(1, 2)}
    for key, line in (("diffusion_model.input_blocks.77.1.proj_in.alpha", "names no layer of a UNet"),
                      (f"{QUERY}.strange", "is not of ComfyUI's format"),
                      ("lora_unet_conv_in.alpha", "not of ")):
        save_file(pair | {key: torch.ones(1)}, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=line):
            load_adapter(tmp_path / "a.safetensors")


def test_the_text_encoder_of_sd2_has_its_own_name(tmp_path: Path) -> None:
    """comfy/text_encoders/sd2_clip.py: `clip_h`."""
    layer = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    adapter = Adapter({layer: (LowRank((8, 4), 2),)}, family="sd2")
    save_adapter(adapter, tmp_path / "a.safetensors", format="comfyui", dtype=torch.float32)
    assert all(key.startswith("text_encoders.clip_h.transformer.") for key in load_file(tmp_path / "a.safetensors"))
    assert set(load_adapter(tmp_path / "a.safetensors").deltas) == {layer}
