"""Real sizes with random weights: one forward pass against the libraries' own networks, within 13 GB."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from impasto.families.base import Base
from impasto.families.load import load_base
from tests.checkpoints import write_large

CAPTION = "a photo of a red barn, in the morning"


def library_network(base: Base, component: str, weights: dict[str, torch.Tensor]) -> Any:
    """The library's own network on the base's weights, which are not copied."""
    config = base.checkpoints[component].configs[component]
    with torch.device("meta"):
        if component == "unet":
            network = UNet2DConditionModel.from_config(config)
        elif component == "vae":
            network = AutoencoderKL.from_config(config)
        else:
            kind = CLIPTextModelWithProjection if "text_projection.weight" in weights else CLIPTextModel
            network = kind(CLIPTextConfig(**config))
    assert isinstance(network, nn.Module)
    if isinstance(network, CLIPTextModel):
        weights = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    missing, _ = network.load_state_dict(weights, strict=False, assign=True)
    assert not [name for name in missing if "position_ids" not in name]
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return network.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def in_fp32(base: Base, component: str) -> Iterator[dict[str, torch.Tensor]]:
    """A block in which a component computes in fp32; yields its weights. Outside of it they are halves, mapped from the
    file: all of SDXL in fp32 is 14 GB, beside which other tests would have no room."""
    network = base.components[component]
    halves = dict(network.state_dict())
    network.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                             for name, tensor in halves.items()}, assign=True)
    yield dict(network.state_dict())
    network.load_state_dict(halves, assign=True)
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_one_forward_pass(family: str, tmp_path: Path) -> None:
    """Text, denoiser and VAE in fp32."""
    path = write_large(tmp_path / "base.safetensors", family)
    base = load_base(path, dtype=torch.float16)
    path.unlink()  # it stays readable while it is mapped; the disk has its room again
    states, pooled = [], None
    with contextlib.ExitStack() as stack:
        weights = {name: stack.enter_context(in_fp32(base, name)) for name in base.text_encoder_names}
        text = base.encode_text([CAPTION])
        for name in base.text_encoder_names:
            encoder, tokenizer = library_network(base, name, weights[name]), tokenizer_of(base, name)
            ids = tokenizer(CAPTION, padding="max_length", return_tensors="pt").input_ids
            said = encoder(ids, output_hidden_states=True)
            states.append(said.hidden_states[-2] if family == "sdxl" else said.last_hidden_state)
            pooled = getattr(said, "text_embeds", None)
            del encoder
        weights.clear()
    close(text["states"], torch.cat(states, dim=-1))
    if pooled is not None:
        close(text["pooled"], pooled)

    x, time = torch.randn(1, 4, 32, 32), torch.tensor([400])
    condition = base.condition(text)
    added = {"added_cond_kwargs": {"text_embeds": text["pooled"], "time_ids": condition["time_ids"]}} \
        if "pooled" in text else {}
    with in_fp32(base, "unet") as held:
        ours = base.predict(x, time, condition)
        close(ours, library_network(base, "unet", held)(x, time, text["states"], **added).sample)
        held.clear()

    with in_fp32(base, "vae") as held:
        vae = library_network(base, "vae", held)
        pixels = torch.rand(1, 3, 128, 128) * 2 - 1
        close(base.encode_images(pixels), vae.encode(pixels).latent_dist.parameters)
        close(base.decode_latents(x[..., :16, :16]), vae.decode(x[..., :16, :16] / vae.config.scaling_factor).sample)


def tokenizer_of(base: Any, name: str) -> Any:
    return base.tokenizers[name] if hasattr(base, "tokenizers") else base.tokenizer
