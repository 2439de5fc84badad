"""Flat names and back, over the real networks' layers and over the whole grammar."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from impasto.core.errors import UserError
from impasto.formats import names

UNETS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def weighted(module: torch.nn.Module) -> list[str]:
    return [n for n, layer in module.named_modules() if isinstance(getattr(layer, "weight", None), Tensor)]


@pytest.mark.parametrize("family", UNETS)
def test_every_layer_of_the_real_unets(family: str) -> None:
    with torch.device("meta"):
        paths = weighted(UNet2DConditionModel(sample_size=64, **UNETS[family]))
    assert len({names.flatten(p) for p in paths}) == len(paths)
    for path in paths:
        assert names.unflatten("unet", names.flatten(path)) == path
        assert names.canonical("unet", path) == path


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_every_layer_of_the_real_text_encoders(kind: type) -> None:
    with torch.device("meta"):
        paths = weighted(kind(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)))
    assert any("mlp.fc1" in path for path in paths)
    for path in paths:
        whole = path if path.startswith("text_") else f"text_model.{path}"
        assert names.unflatten("text_encoder", names.flatten(path)) == whole
        assert names.unflatten("text_encoder", names.flatten(whole)) == whole
        assert names.canonical("text_encoder", path) == whole


@pytest.mark.parametrize("dual", [(), tuple(range(13))])
def test_every_layer_of_the_real_transformers(dual: tuple[int, ...]) -> None:
    """SD 3's and SD 3.5 medium's."""
    with torch.device("meta"):
        paths = weighted(SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=dual, qk_norm="rms_norm" if dual else None))
    assert len({names.flatten(p) for p in paths}) == len(paths) > 24 * 13
    for path in paths:
        assert names.unflatten("transformer", names.flatten(path)) == path
        assert names.canonical("transformer", path) == path
        assert not names.is_norm(path) or not names.has_bias(f"transformer.{path}")


def test_every_layer_of_the_real_t5() -> None:
    with torch.device("meta"):
        module = T5EncoderModel(T5Config(d_model=64, num_layers=3, feed_forward_proj="gated-gelu"))
    paths = weighted(module)
    assert "encoder.block.2.layer.1.DenseReluDense.wi_0" in paths
    for path in paths:
        assert names.unflatten("text_encoder_3", names.flatten(path)) == path
        assert names.canonical("text_encoder_3", path) == path
        table = isinstance(module.get_submodule(path), torch.nn.Embedding)
        assert names.is_embedding(f"text_encoder_3.{path}") == table


@pytest.mark.parametrize("rule", ["unet", "clip", "mmdit_layers", "t5"])
def test_a_flat_name_has_one_reading_whatever_the_numbers(rule: str) -> None:
    """Templates whose flat forms agree but for the numbers have their dots in the same places."""
    dots: dict[str, set[str]] = {}
    for template in names.templates(rule):
        shape = re.sub(r"\d+", "#", template)
        dots.setdefault(shape.replace(".", "_"), set()).add(shape)
    assert all(len(shapes) == 1 for shapes in dots.values()), dots
    assert len(set(names.templates(rule))) == len(names.templates(rule))


def test_any_number_of_blocks() -> None:
    path = "down_blocks.12.attentions.345.transformer_blocks.67.attn2.to_out.0"
    assert names.unflatten("unet", path.replace(".", "_")) == path


@pytest.mark.parametrize("flat", [
    "", "down_blocks_0", "down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q", "conv_in_", "conv.in",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q", "down_blocks_x_resnets_0_conv1", "ff_net_1",
    "mid_block_attentions_0_transformer_blocks_0_ff_net_1_proj", "text_model_final_layer_norm",
])
def test_an_unknown_name_is_a_user_error_that_names_it(flat: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(flat))):
        names.unflatten("unet", flat, where="file.safetensors")
    with pytest.raises(UserError):
        names.canonical("unet", flat)


def test_split_wants_a_known_component() -> None:
    assert names.split("text_encoder.encoder.layers.3.mlp.fc2") == (
        "text_encoder", "text_model.encoder.layers.3.mlp.fc2")
    with pytest.raises(UserError, match="unet"):
        names.split("unit.conv_in")
