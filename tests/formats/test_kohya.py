"""kohya's format against its specification, safetensors' own writer and diffusers' loader."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.header import read_header
from tests.formats.adapter_cases import (
    dense,
    mini_text_encoder,
    mini_unet,
    patched,
    random_adapter,
    text_output,
    unet_output,
    worst,
)

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def pipeline() -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae=None, text_encoder=mini_text_encoder(), tokenizer=None, unet=mini_unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def flat(layer: str, text: str = "lora_te_") -> str:
    """kohya's name of a layer, the plain way."""
    return layer.replace("unet.", "lora_unet_", 1).replace("text_encoder.", text, 1).replace(".", "_")


@pytest.mark.parametrize("rslora", [False, True])
def test_keys_shapes_and_alpha(tmp_path: Path, rslora: bool) -> None:
    adapter = random_adapter(alpha=3.0, rslora=rslora)
    save_adapter(adapter, tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 3 * len(adapter.deltas)
    for layer, (term,) in adapter.deltas.items():
        name = flat(layer)
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        alpha = tensors[f"{name}.alpha"]
        assert up.shape == term.up.shape and down.shape == term.down.shape and alpha.shape == ()
        assert up.dtype == down.dtype == torch.float16 and alpha.dtype == torch.float32
        r = down.shape[0]
        assert float(alpha) == pytest.approx(3.0 * (math.sqrt(r) if rslora else 1.0))
    assert tensors[f"{QUERY}.lora_up.weight"].ndim == 2
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape[2:] == (3, 3)
    assert tensors["lora_unet_conv_in.lora_up.weight"].shape[2:] == (1, 1)


def test_sdxl_numbers_its_text_encoders(tmp_path: Path) -> None:
    term = (LowRank.from_factors(torch.ones(4, 1), torch.ones(1, 4), alpha=1.0),)
    path = "text_model.encoder.layers.31.mlp.fc1"
    second = "text_encoder_2"
    layers = {f"text_encoder.{path}": term, f"{second}.{path}": term, f"{second}.text_projection": term}
    adapter = Adapter(deltas=layers, metadata={}, family="sdxl", base={})
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert {key.partition(".")[0] for key in read_header(tmp_path / "a.safetensors").tensors} == {
        "lora_te1_text_model_encoder_layers_31_mlp_fc1", "lora_te2_text_model_encoder_layers_31_mlp_fc1",
        "lora_te2_text_projection"}
    assert set(load_adapter(tmp_path / "a.safetensors").deltas) == set(layers)


def test_the_refiners_text_encoder_bears_no_number(tmp_path: Path) -> None:
    """So ComfyUI and Forge look for it, but for the projection; files that number it are read too."""
    term = (LowRank.from_factors(torch.ones(4, 1), torch.ones(1, 4), alpha=1.0),)
    layers = {f"text_encoder_2.{path}": term for path in ("text_model.encoder.layers.31.mlp.fc1", "text_projection")}
    save_adapter(Adapter(deltas=layers, metadata={}, family="sdxl-refiner", base={}), tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {key.partition(".")[0] for key in tensors} == {
        "lora_te_text_model_encoder_layers_31_mlp_fc1", "lora_te2_text_projection"}
    told = read_header(tmp_path / "a.safetensors").metadata
    numbered = {key.replace("lora_te_", "lora_te2_"): tensor.clone() for key, tensor in tensors.items()}
    safetensors.torch.save_file(numbered, tmp_path / "b.safetensors", told)
    safetensors.torch.save_file(tensors | numbered, tmp_path / "c.safetensors", told)
    for name in ("a", "b"):
        assert set(load_adapter(tmp_path / f"{name}.safetensors").deltas) == set(layers)
    with pytest.raises(UserError, match="31.mlp.fc1 is there twice"):
        load_adapter(tmp_path / "c.safetensors")


def test_without_alpha_the_scale_is_one_and_shapes_may_be_mixed(tmp_path: Path) -> None:
    """Files hold 1×1 convolutions as matrices, the other way round, half and half; alpha may be an int."""
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 3, generator=draw), torch.randn(3, 5, generator=draw)
    wide = [t[:, :, None, None].clone() for t in (up, down)]
    for i, (u, d) in enumerate([(up, down), (wide[0], wide[1]), (up, wide[1]), (wide[0], down)]):
        for alpha in (None, torch.tensor(6), torch.tensor([6.0])):
            tensors = {f"{QUERY}.lora_up.weight": u.clone(), f"{QUERY}.lora_down.weight": d.clone()}
            if alpha is not None:
                tensors[f"{QUERY}.alpha"] = alpha
            path = tmp_path / f"{i}.safetensors"
            safetensors.torch.save_file(tensors, path)
            (delta,) = dense(load_adapter(path)).values()
            want = (1 if alpha is None else 2) * (up.double() @ down.double())
            torch.testing.assert_close(delta.reshape(8, 5), want)


def test_metadata(tmp_path: Path) -> None:
    save_adapter(random_adapter(alpha=1.0), tmp_path / "cat.safetensors",
                 metadata={"ss_steps": "100", "modelspec.date": "2026-01-02T03:04:05"})
    with safetensors.safe_open(tmp_path / "cat.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.items() >= {
        "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "ss_network_alpha": "1",
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_seed": "7", "ss_steps": "100",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "cat", "modelspec.resolution": "512x512", "modelspec.prediction_type": "epsilon",
        "modelspec.date": "2026-01-02T03:04:05", "impasto.family": "sd1", "impasto.base": '{"unet": "ab12"}',
    }.items()
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "Dynamic", "conv_alpha": "1"}


def test_hashes_are_kohyas(tmp_path: Path) -> None:
    """As kohya computes them: over a file in memory, written by safetensors with the ss_* metadata alone."""
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(320, 900, generator=draw), torch.randn(900, 768, generator=draw)
    term = LowRank.from_factors(up, down, alpha=1.0)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    path = tmp_path / "a.safetensors"
    save_adapter(Adapter(deltas={layer: (term,)}, metadata={"ss_t": "é\n\"x\""}, family="sd1", base={}), path)
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(raw[header.start:]).hexdigest()
    assert header.metadata["modelspec.hash_sha256"] == "0x" + header.metadata["sshs_model_hash"]
    said = {k: v for k, v in header.metadata.items() if k.startswith("ss_")}
    memory = safetensors.torch.save(safetensors.torch.load_file(path), said)
    assert len(memory) > (1 << 20) + (1 << 16)
    window = memory[1 << 20:(1 << 20) + (1 << 16)]
    assert header.metadata["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]
    start = 8 + int.from_bytes(memory[:8], "little")
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(memory[start:]).hexdigest()


def test_hashes_of_a_small_file(tmp_path: Path) -> None:
    save_adapter(random_adapter(), tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors").metadata["sshs_legacy_hash"] == "e3b0c442"  # of nothing


def test_diffusers_loads_it(tmp_path: Path) -> None:
    """The same outputs as with the dense deltas added to the weights."""
    adapter = random_adapter(alpha=2.0)
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    pipe = pipeline()
    plain = unet_output(pipe.unet), text_output(pipe.text_encoder)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    got = unet_output(pipe.unet), text_output(pipe.text_encoder)
    want = (unet_output(patched(mini_unet(), "unet", dense(adapter))),
            text_output(patched(mini_text_encoder(), "text_encoder", dense(adapter))))
    for a, b, base in zip(got, want, plain, strict=True):
        assert (b - base).abs().max() > 1e-2
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    deltas = load_adapter(tmp_path / "a.safetensors").deltas
    unet = {"unet": mini_unet()}
    with attach(unet, {layer: terms for layer, terms in deltas.items() if layer.startswith("unet.")}):
        torch.testing.assert_close(unet_output(unet["unet"]), got[0], rtol=1e-4, atol=1e-5)


def test_a_file_of_another_trainer(tmp_path: Path) -> None:
    """Alphas in fp16, bf16 factors, keys in any order, a second prefix for the text encoder."""
    adapter = random_adapter(alpha=4.0)
    tensors = {}
    for layer, (term,) in reversed(adapter.deltas.items()):
        name = flat(layer, "lora_te1_")
        tensors |= {f"{name}.alpha": torch.tensor(4.0, dtype=torch.float16),
                    f"{name}.lora_down.weight": term.down.detach().bfloat16(),
                    f"{name}.lora_up.weight": term.up.detach().bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    assert worst(dense(load_adapter(tmp_path / "a.safetensors")), dense(adapter)) < 4e-3
