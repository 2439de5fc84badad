"""A miniature of SD 3.5's networks, and random adapters for them."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.lowrank import LowRank

DATA = Path(__file__).parent / "data"

Q, K, V = (f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv")
QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


@cache
def keys(program: str) -> dict[str, Any]:
    """Names of layers that a program has, and what it says of them; see the file for where this was seen."""
    return json.loads((DATA / f"sd3_{program}.json").read_text(encoding="utf-8"))["layers"]


def mini_transformer() -> SD3Transformer2DModel:
    """Three blocks of 16 channels, the first with a second attention."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval().requires_grad_(False)


def mini_clip() -> CLIPTextModelWithProjection:
    torch.manual_seed(1)
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12)).eval().requires_grad_(False)


def mini_t5() -> T5EncoderModel:
    torch.manual_seed(2)
    return T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2,
                                   feed_forward_proj="gated-gelu")).eval().requires_grad_(False)


def networks() -> dict[str, nn.Module]:
    return {"transformer": mini_transformer(), "text_encoder": mini_clip(), "text_encoder_2": mini_clip(),
            "text_encoder_3": mini_t5()}


TEXT = {"text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2": "text_model.encoder.layers.1.self_attn.out_proj",
        "text_encoder_3": "encoder.block.1.layer.1.DenseReluDense.wi_1"}


def linear_layers() -> list[str]:
    """All linear layers of the transformer, and its convolution."""
    return [f"transformer.{name}" for name, layer in mini_transformer().named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)]


def sd3_adapter(layers: list[str] | None = None, *, alpha: float | None = None, text: tuple[str, ...] = tuple(TEXT)
                ) -> Adapter:
    """LoRAs on all layers, of ranks 1 to 4 and alphas that are no powers of two, or of the one that is given."""
    draw, modules = torch.Generator().manual_seed(3), networks()
    deltas: dict[str, tuple[Delta, ...]] = {}
    for i, layer in enumerate((layers or linear_layers()) + [f"{component}.{TEXT[component]}" for component in text]):
        component, _, path = layer.partition(".")
        shape, rank = modules[component].get_submodule(path).weight.shape, 1 + i % 4
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=draw) * 0.1
        down = torch.randn(rank, *shape[1:], generator=draw) / math.sqrt(shape[1:].numel())
        own = alpha if alpha is not None else 0.3 + 0.7 * i
        deltas[layer] = (LowRank.from_factors(up, down, alpha=own),)
    return Adapter(deltas, metadata={"ss_seed": "7"}, family="sd3", base={"transformer": "ab12"})


def pair(out: int, rank: int, seed: int, into: int = 5) -> tuple[Tensor, Tensor]:
    """A LoRA's factors."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=draw), torch.randn(rank, into, generator=draw)


def dense32(adapter: Adapter) -> dict[str, Tensor]:
    """The change of each layer, in full."""
    return {layer: sum(term.weight().detach().double() for term in terms) for layer, terms in adapter.deltas.items()}
