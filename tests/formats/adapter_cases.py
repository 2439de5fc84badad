"""Random adapters, and a small real network to try them on; shared by the tests of the adapter formats."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
#: Linear, convolutions 1×1, 3×3, 3×3 of stride 2; of every part of the UNet
UNET_LAYERS = (
    f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.0.proj",
    f"{BLOCK}.ff.net.2", "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.time_emb_proj", "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv", "mid_block.resnets.1.conv2",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v", "up_blocks.1.attentions.1.proj_out",
    "time_embedding.linear_2", "conv_in", "conv_out",
)
TEXT_LAYERS = (
    "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.self_attn.out_proj",
    "text_model.encoder.layers.1.mlp.fc1", "text_model.encoder.layers.0.mlp.fc2",
)


def mini_unet() -> UNet2DConditionModel:
    """SD 1's kind of UNet (1×1 convolutions around the attention), small."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=4,
    ).eval().requires_grad_(False)


def mini_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    )).eval().requires_grad_(False)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The layer at `path`, whose `text_model.` is there or not with the version of transformers."""
    return module.get_submodule(path if hasattr(module, "text_model") else path.removeprefix("text_model."))


def random_adapter(*, alpha: float | None = None, seed: int = 0, text: bool = True, family: str = "sd1",
                   rslora: bool = False) -> Adapter:
    """Ranks 1 to 6; the given alpha everywhere, or a different one (no power of two) in each layer."""
    draw = torch.Generator().manual_seed(seed)
    unet, encoder = mini_unet(), mini_text_encoder()
    chosen = [("unet", unet, path) for path in UNET_LAYERS]
    chosen += [("text_encoder", encoder, path) for path in TEXT_LAYERS] if text else []
    deltas = {}
    for i, (component, module, path) in enumerate(chosen):
        shape, rank = submodule(module, path).weight.shape, 1 + i % 6
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=draw) * 0.1
        down = torch.randn(rank, *shape[1:], generator=draw) / math.sqrt(shape[1:].numel())
        own = alpha if alpha is not None else 0.3 + 0.7 * i
        deltas[f"{component}.{path}"] = (LowRank.from_factors(up, down, alpha=own, rslora=rslora),)
    return Adapter(deltas=deltas, metadata={"ss_seed": "7"}, family=family, base={"unet": "ab12"})


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """dW of each layer in float64, from the definition: Σ scale · up · down."""
    return {layer: sum(_product(t) for t in terms) for layer, terms in adapter.deltas.items()}


def _product(term: LowRank) -> Tensor:
    up, down = term.up.detach().double(), term.down.detach().double()
    scale = term.alpha / (math.sqrt(down.shape[0]) if term.rslora else down.shape[0])
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def worst(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest relative (Frobenius) error over the layers, which must be the same ones."""
    assert set(got) == set(want), set(got) ^ set(want)
    return max(float((got[k].double() - want[k]).norm() / want[k].norm()) for k in want)


@torch.no_grad()
def patched(module: nn.Module, component: str, deltas: Mapping[str, Tensor]) -> nn.Module:
    """`module` with the dense deltas added to its weights: what an adapter means."""
    for layer, delta in deltas.items():
        own, _, path = layer.partition(".")
        if own == component:
            weight = submodule(module, path).weight
            weight += delta.reshape(weight.shape).to(weight.dtype)
    return module


@torch.no_grad()
def unet_output(unet: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 7, 32, generator=draw)
    return unet(x, torch.tensor([10, 500]), context).sample


@torch.no_grad()
def text_output(encoder: nn.Module) -> Tensor:
    return encoder(torch.arange(14).reshape(2, 7)).last_hidden_state
