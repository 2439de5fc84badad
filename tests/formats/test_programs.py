"""Verdicts on what other programs load, held against diffusers itself and against what their sources say."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.deltas.lowrank import LowRank
from impasto.formats import programs
from impasto.formats.adapters import save_adapter
from impasto.formats.header import read_header
from tests.formats.adapter_cases import (
    dense,
    mini_text_encoder,
    mini_unet,
    patched,
    random_adapter,
    unet_output,
)
from tests.formats.kind_cases import MAKERS, adapter_of_kind, output_with
from tests.formats.test_kohya import pipeline


def everything() -> Adapter:
    """A LoRA on every linear and convolutional layer of both networks."""
    deltas = {}
    for component, module in (("unet", mini_unet()), ("text_encoder", mini_text_encoder())):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                shape = layer.weight.shape
                up, down = torch.ones(shape[0], 1, *(1 for _ in shape[2:])), torch.ones(1, *shape[1:])
                deltas[f"{component}.{name}"] = (LowRank.from_factors(up, down, alpha=1.0),)
    return Adapter(deltas=deltas, metadata={}, family="sd1", base={})


def loaded(path: Path) -> dict[str, tuple[int, int]]:
    return {v.program: (v.loaded, v.total) for v in programs.of_file(path)}


def test_kohya_files_load_everywhere(tmp_path: Path) -> None:
    adapter = everything()
    save_adapter(adapter, tmp_path / "a.safetensors")
    total = len(adapter.deltas)
    counts = loaded(tmp_path / "a.safetensors")
    assert counts.pop("kohya") == (total - 4, total)  # conv_in, conv_out and time_embedding it never trains
    assert set(counts.values()) == {(total, total)}


def test_diffusers_files_load_in_diffusers(tmp_path: Path) -> None:
    adapter = everything()
    save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers")
    total, attention = len(adapter.deltas), sum(".attn" in layer for layer in adapter.deltas)
    counts = loaded(tmp_path / "a.safetensors")
    assert counts == {
        "diffusers": (total, total), "A1111": (0, total), "kohya": (0, total),
        "ComfyUI": (total - attention, total), "Forge": (0, total)}  # it gives up for more than 12 unknown keys


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_agrees(tmp_path: Path, format: str) -> None:
    """As many layers carry a LoRA in a pipeline as the verdict says."""
    save_adapter(everything(), tmp_path / "a.safetensors", format=format)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    carried = sum(isinstance(m, peft.tuners.lora.LoraLayer)
                  for module in (pipe.unet, pipe.text_encoder) for m in module.modules())
    assert loaded(tmp_path / "a.safetensors")["diffusers"] == (carried, carried)


def test_diffusers_misreads_several_alphas(tmp_path: Path) -> None:
    """The caution is true: delete it when this fails because diffusers was mended."""
    adapter = random_adapter(text=False)
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    pipe = pipeline()
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        pipe.load_lora_weights(tmp_path / "a.safetensors")
    want = unet_output(patched(mini_unet(), "unet", dense(adapter)))
    assert (unet_output(pipe.unet) - want).abs().max() > 1e-2
    (verdict,) = (v for v in programs.of_file(tmp_path / "a.safetensors") if v.program == "diffusers")
    assert "one common alpha" in verdict.caution
    save_adapter(random_adapter(alpha=1.0), tmp_path / "b.safetensors")
    assert not any(v.caution for v in programs.of_file(tmp_path / "b.safetensors"))


def test_diffusers_fails_without_attention_in_the_text_encoder(tmp_path: Path) -> None:
    adapter = random_adapter()
    chosen = {k: v for k, v in adapter.deltas.items() if k.startswith("unet.") or ".mlp." in k}
    save_adapter(replace(adapter, deltas=chosen), tmp_path / "a.safetensors", format="diffusers")
    with pytest.raises(ValueError, match="state dict type"):
        pipeline().load_lora_weights(tmp_path / "a.safetensors")
    assert any("text encoder" in v.caution for v in programs.of_file(tmp_path / "a.safetensors"))


def test_older_spellings_and_unknown_keys() -> None:
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    keys = [f"{block}.attn1.processor.to_q_lora.{f}.weight" for f in ("up", "down")]
    keys += [f"{block}.attn1.to_k.lora.{f}.weight" for f in ("up", "down")]
    counts = {v.program: v.loaded for v in programs.verdicts([*keys, "lora_unet_conv_inn.alpha"])}
    assert counts == {"A1111": 0, "Forge": 1, "ComfyUI": 1, "kohya": 0, "diffusers": 2}
    assert all("lora_unet_conv_inn.alpha" in v.ignored for v in programs.verdicts([*keys, "lora_unet_conv_inn.alpha"]))


def test_new_tokens_beside_a_lora(tmp_path: Path) -> None:
    """diffusers refuses the whole file, A1111 loads all of it, the others leave the tokens out; no token is a layer."""
    tokens = {"<cat>": {"text_encoder": torch.ones(2, 768)}, "dog": {"text_encoder": torch.ones(1, 768)}}
    save_adapter(replace(everything(), embeddings=tokens), tmp_path / "a.safetensors")
    total = len(everything().deltas)
    found = {verdict.program: verdict for verdict in programs.of_file(tmp_path / "a.safetensors")}
    assert {verdict.total for verdict in found.values()} == {total}
    assert {name: verdict.loaded for name, verdict in found.items()} == {
        "A1111": total, "Forge": total, "ComfyUI": total, "kohya": total - 4, "diffusers": 0}
    for program in ("Forge", "ComfyUI", "kohya"):
        assert found[program].caution == "ignores the new tokens"
        assert {key for key in found[program].ignored if "bundle_emb" in key} == {
            f"bundle_emb.{token}.string_to_param.*" for token in tokens}
    assert (found["A1111"].caution, found["A1111"].ignored) == ("", ())
    assert "new tokens" in found["diffusers"].caution
    assert set(found["diffusers"].ignored) == set(read_header(tmp_path / "a.safetensors").tensors)
    pipe = pipeline()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("strange", ["bundle_emb.a.string_to_param.*", "bundle_emb.a.clip_l", "conv_in.hada_w1_a"])
def test_one_key_without_the_word_lora_has_diffusers_refuse_a_file(tmp_path: Path, strange: str) -> None:
    """Whatever the spelling of the rest."""
    for format in ("kohya", "diffusers"):
        save_adapter(everything(), tmp_path / "a.safetensors", format=format)
        tensors = safetensors.torch.load_file(tmp_path / "a.safetensors") | {strange: torch.ones(1, 4)}
        (verdict,) = (v for v in programs.verdicts(tensors) if v.program == "diffusers")
        assert verdict.loaded == 0 and set(verdict.ignored) == set(tensors)
        safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            pipeline().load_lora_weights(tmp_path / "b.safetensors")


def test_a_peft_folder_is_for_peft(tmp_path: Path) -> None:
    save_adapter(random_adapter(text=False), tmp_path / "a", format="peft")
    keys = read_header(tmp_path / "a" / "adapter_model.safetensors").tensors
    assert {v.loaded for v in programs.verdicts(keys)} == {0}


# --- other kinds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "lora"])
def test_other_kinds_in_kohyas_format(tmp_path: Path, kind: str) -> None:
    """They load in all but diffusers, which refuses the whole file, and of DoRA drops the magnitudes."""
    adapter = adapter_of_kind(kind)
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    total = len(adapter.deltas)
    found = {verdict.program: verdict for verdict in programs.of_file(tmp_path / "a.safetensors")}
    for program in ("A1111", "Forge", "ComfyUI", "kohya"):
        assert (found[program].loaded, found[program].total, found[program].ignored) == (total, total, ())
    assert "lycoris.kohya" in found["kohya"].caution
    assert found["diffusers"].loaded == 0
    pipe = pipeline()
    if kind in ("dora", "dora-in"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of several alphas
            pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
        assert "magnitudes" in found["diffusers"].caution
        assert (unet_output(pipe.unet) - output_with(adapter, "unet", unet_output)).abs().max() > 1e-2
    else:
        with pytest.raises(ValueError, match="renamed|not valid"):
            pipe.load_lora_weights(str(tmp_path / "a.safetensors"))


def test_norms_and_biases(tmp_path: Path) -> None:
    """ComfyUI has no text encoder's norms in its map, A1111 no last norm; a bias alone is for ComfyUI alone."""
    change = Dense.from_weight(torch.ones(32), torch.ones(32))
    layers = ["unet.conv_norm_out", "unet.down_blocks.0.resnets.0.norm1",
              "text_encoder.text_model.encoder.layers.0.layer_norm1", "text_encoder.text_model.final_layer_norm"]
    deltas = {layer: (change,) for layer in layers}
    deltas["unet.conv_in"] = (Dense.from_weight(None, torch.ones(32)),)
    save_adapter(Adapter(deltas, family="sd1"), tmp_path / "a.safetensors")
    assert loaded(tmp_path / "a.safetensors") == {
        "A1111": (2, 5), "Forge": (3, 5), "ComfyUI": (3, 5), "kohya": (4, 5), "diffusers": (0, 5)}


def test_cautions_of_dora_and_tucker_cores() -> None:
    dora = [f"lora_unet_conv_in.{part}" for part in ("lora_up.weight", "lora_down.weight", "dora_scale")]
    core = [f"lora_unet_conv_in.lokr_{part}" for part in ("w1", "w2_a", "w2_b", "t2")]
    said = {v.program: v.caution for v in programs.verdicts(dora)}
    assert "inputs" in said["A1111"] and "unchanged weight" in said["ComfyUI"] == said["Forge"]
    said = {v.program: v.caution for v in programs.verdicts(core)}
    assert "Tucker" in said["ComfyUI"] and not said["A1111"]


def test_a_strided_factor_is_what_comfyui_fails_on() -> None:
    """Its LoKr with a Tucker core, comfy/weight_adapter/lokr.py; delete the caution when torch mends it."""
    core, b, a = torch.randn(2, 2, 3, 3), torch.randn(2, 5), torch.randn(2, 4)
    second = torch.einsum("i j k l, j r, i p -> p r k l", core, b, a)
    with pytest.raises(RuntimeError, match="view"):
        torch.kron(torch.randn(3, 3, 1, 1), second)


def test_lycoris_names_load_in_comfyui_alone(tmp_path: Path) -> None:
    save_adapter(random_adapter(text=False), tmp_path / "a.safetensors")
    keys = [key.replace("lora_unet_", "lycoris_") for key in read_header(tmp_path / "a.safetensors").tensors]
    counts = {v.program: v.loaded == v.total for v in programs.verdicts(keys)}
    assert counts == {"A1111": False, "Forge": True, "ComfyUI": True, "kohya": False, "diffusers": False}
