"""SDXL's and SD 3's networks with all their layers, each a few numbers wide, and files of LoRAs on all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import peft
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from impasto.formats import original
from impasto.formats.configs import CONFIGS

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def text_encoder(kind: type, layers: int) -> nn.Module:
    return kind(CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=layers, vocab_size=9,
        projection_dim=8, max_position_embeddings=4, bos_token_id=0, eos_token_id=1))


def sdxl(family: str) -> StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline:
    shape = CONFIGS.get(family).parts["unet"].config
    unet = UNet2DConditionModel(**{
        **shape, "block_out_channels": [8 * n // shape["block_out_channels"][0] for n in shape["block_out_channels"]],
        "norm_num_groups": 4,
        "attention_head_dim": 4, "cross_attention_dim": 8, "addition_embed_type": "text_time", "sample_size": 8,
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32})
    first = text_encoder(CLIPTextModel, 12) if family == "sdxl" else None
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionXLImg2ImgPipeline
    return kind(vae=None, text_encoder=first, text_encoder_2=text_encoder(CLIPTextModelWithProjection, 32),
                tokenizer=None, tokenizer_2=None, unet=unet, scheduler=EulerDiscreteScheduler())


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=24, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
        pos_embed_max_size=8)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=text_encoder(CLIPTextModelWithProjection, 12), tokenizer=None,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 32), tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None)


def layers(pipe: object) -> dict[str, nn.Module]:
    """Every layer that may carry a LoRA, by component and path; a text encoder's path with `text_model.`."""
    return {f"{component}.{_whole(component, name)}": layer for component in COMPONENTS
            for name, layer in _modules(pipe, component) if isinstance(layer, nn.Linear | nn.Conv2d)}


def carried(pipe: object) -> set[str]:
    """The layers that do carry one."""
    return {f"{component}.{_whole(component, name)}" for component in COMPONENTS
            for name, layer in _modules(pipe, component) if isinstance(layer, peft.tuners.lora.LoraLayer)}


def _modules(pipe: object, component: str) -> Iterable[tuple[str, nn.Module]]:
    network = getattr(pipe, component, None)
    return () if network is None else network.named_modules()


def _whole(component: str, name: str) -> str:
    inside = component.startswith("text_encoder") and not name.startswith("text_")
    return f"text_model.{name}" if inside else name


#: how a file names a layer, and what follows: up, down, and alpha if there is one
KOHYA = (".lora_up.weight", ".lora_down.weight", ".alpha")
PEFT = (".lora_B.weight", ".lora_A.weight")


def file_of(layers: Mapping[str, nn.Module], name: Callable[[str], str], endings: tuple[str, ...] = KOHYA
            ) -> dict[str, Tensor]:
    """A LoRA of rank 1 on each layer."""
    tensors = {}
    for layer, module in layers.items():
        shape = module.get_parameter("weight").shape
        factors = torch.ones(shape[0], 1, *(1 for _ in shape[2:])), torch.ones(1, *shape[1:]), torch.tensor(1.0)
        tensors |= {name(layer) + ending: factor for ending, factor in zip(endings, factors, strict=False)}
    return tensors


_FLAT = {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder": "lora_te1_",
         "text_encoder_2": "lora_te2_"}


def kohya(layer: str) -> str:
    """diffusers' names in kohya's spelling."""
    component, _, path = layer.partition(".")
    return _FLAT[component] + path.replace(".", "_")


def own(family: str) -> Callable[[str], str]:
    """The authors' names in kohya's spelling."""
    def name(layer: str) -> str:
        component, _, path = layer.partition(".")
        return kohya(f"unet.{original.originals(family)[path]}" if component == "unet" else layer)
    return name


def comfyui(family: str) -> Callable[[str], str]:
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

    def name(layer: str) -> str:
        component, _, path = layer.partition(".")
        if component == "unet":
            return f"diffusion_model.{original.originals(family)[path]}"
        return f"text_encoders.{encoders[component]}.transformer.{path}"
    return name


#: of SD 3 in diffusers' names -> the authors', whose q, k and v are one layer
_JOINT = (
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]$", r"joint_blocks.\1.x_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$", r"joint_blocks.\1.context_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"joint_blocks.\1.x_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out$", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj$", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2$", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2$", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear$", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear$", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"time_text_embed\.timestep_embedder\.linear_1$", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2$", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1$", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2$", "y_embedder.mlp.2"),
    (r"pos_embed\.proj$", "x_embedder.proj"), (r"norm_out\.linear$", "final_layer.adaLN_modulation.1"),
    (r"proj_out$", "final_layer.linear"), (r"context_embedder$", "context_embedder"),
)


def joint(layer: str) -> str:
    """The authors' name of a layer of the transformer, dotted."""
    path = layer.removeprefix("transformer.")
    return next(re.sub(pattern, name, path) for pattern, name in _JOINT if re.match(pattern, path))
