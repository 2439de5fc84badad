"""SD 3's adapters in diffusers' and peft's own loaders, both ways."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from impasto.deltas.adapter import Adapter
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.detect import detect
from tests.formats.adapter_cases import dense, worst
from tests.formats.sd3_cases import mini_clip, mini_transformer, networks, sd3_adapter


def pipeline() -> StableDiffusion3Pipeline:
    diffusers_logging.set_verbosity_error()
    pipe = StableDiffusion3Pipeline(
        transformer=mini_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=mini_clip(), tokenizer=None, text_encoder_2=mini_clip(), tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def output(transformer: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return transformer(torch.randn(1, 16, 8, 8, generator=draw), torch.randn(1, 7, 32, generator=draw),
                       torch.randn(1, 24, generator=draw), torch.tensor([500.0])).sample


@torch.no_grad()
def text_output(encoder: nn.Module) -> Tensor:
    return encoder(torch.arange(7)[None]).last_hidden_state


@torch.no_grad()
def patched(module: nn.Module, component: str, adapter: Adapter) -> nn.Module:
    for layer, change in dense(adapter).items():
        own, _, path = layer.partition(".")
        if own == component:
            module.get_submodule(path).weight += change.float()
    return module


def test_diffusers_loads_our_file(tmp_path: Path) -> None:
    adapter = sd3_adapter(text=("text_encoder", "text_encoder_2"))
    save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers", dtype=torch.float32)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    wanted = output(patched(mini_transformer(), "transformer", adapter))
    assert (output(pipe.transformer) - wanted).abs().max() < 1e-4
    assert (wanted - output(mini_transformer())).abs().max() > 1e-2
    for component in ("text_encoder", "text_encoder_2"):
        wanted = text_output(patched(mini_clip(), component, adapter))
        assert (text_output(getattr(pipe, component)) - wanted).abs().max() < 1e-4
        assert (wanted - text_output(mini_clip())).abs().max() > 1e-3


def test_we_load_the_file_of_diffusers(tmp_path: Path) -> None:
    """Of `save_lora_weights`, with an alpha that its metadata tell."""
    pipe = pipeline()
    targets = ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "attn2.to_v", "ff.net.2", "norm1.linear", "proj_out"]
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    text = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(text, pipe.text_encoder_2)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer),
        text_encoder_2_lora_layers=peft.get_peft_model_state_dict(pipe.text_encoder_2),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
        text_encoder_2_lora_adapter_metadata=text.to_dict())
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.family == "sd3" and detect(tmp_path / "pytorch_lora_weights.safetensors").family == "sd3"
    assert len(adapter.layers) == 3 * 3 + 1 + 3 + 3 + 1 + 2
    wanted = output(patched(mini_transformer(), "transformer", adapter))
    assert (output(pipe.transformer) - wanted).abs().max() < 1e-4
    wanted = text_output(patched(mini_clip(), "text_encoder_2", adapter))
    assert (text_output(pipe.text_encoder_2) - wanted).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21, transformers 5.24
def test_peft_folders_both_ways(tmp_path: Path) -> None:
    adapter = sd3_adapter()
    save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)
    assert worst(dense(load_adapter(tmp_path / "a")), dense(adapter)) < 1e-6
    for component, module in networks().items():
        wrapped = PeftModel.from_pretrained(module, str(tmp_path / "a" / component))
        wrapped.save_pretrained(str(tmp_path / "b" / component))
    again = load_adapter(tmp_path / "b")
    assert worst(dense(again), dense(adapter)) < 1e-6
    wrapped = PeftModel.from_pretrained(mini_transformer(), str(tmp_path / "a" / "transformer"))
    wanted = output(patched(mini_transformer(), "transformer", adapter))
    assert (output(wrapped) - wanted).abs().max() < 1e-4
