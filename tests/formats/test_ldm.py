"""Names and shapes of both layouts, against diffusers' networks and diffusers' own converters."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impasto.core.errors import UserError
from impasto.formats.configs import CONFIGS, FamilyConfig, Part
from impasto.formats.ldm import unet_config, unet_entries, vae_config, vae_entries
from impasto.formats.text_layouts import clip_config
from tests.checkpoints import as_ldm, build, component_configs, spelled

SD1: FamilyConfig = CONFIGS.get("sd1")
#: those of SD 3 are in test_mmdit
ALL = [(family, component) for family in CONFIGS if family != "sd3" for component in CONFIGS.get(family).parts]


def on_meta(kind: str, config: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return spelled(build("", config, kind=kind))


def converted(part: Part, weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """What diffusers' converter makes of the same weights under the keys of an LDM file."""
    keys = as_ldm(part, config, weights)
    match part.classes[0]:
        case "UNet2DConditionModel":
            return convert_ldm_unet_checkpoint(keys, config)
        case "AutoencoderKL":
            return convert_ldm_vae_checkpoint(keys, config)
        case _ if "model" in part.prefix.split("."):  # OpenCLIP's names
            encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            return convert_open_clip_checkpoint(encoder, keys, part.prefix)
        case _:
            return convert_ldm_clip_checkpoint(keys)


@pytest.mark.parametrize("size", ["mini", "real"])
@pytest.mark.parametrize(("family", "component"), ALL)
def test_names_and_shapes_are_the_networks_own(family, component, size) -> None:
    part, config = CONFIGS.get(family).parts[component], component_configs(family, size)[component]
    expected = {name: tuple(tensor.shape) for name, tensor in on_meta(part.classes[0], config).items()}
    assert {entry.name: entry.shape for entry in part.entries(config)} == expected


@pytest.mark.parametrize("size", ["mini", "real"])
@pytest.mark.parametrize(("family", "component"), ALL)
def test_diffusers_converter_gives_the_same_names(family, component, size) -> None:
    part, config = CONFIGS.get(family).parts[component], component_configs(family, size)[component]
    weights = on_meta(part.classes[0], config)
    found = converted(part, weights, config)
    unused = found.keys() - weights.keys()  # diffusers knows those of real size alone
    assert {n: t.shape for n, t in found.items() if n not in unused} == {n: t.shape for n, t in weights.items()}
    assert not unused or (family, component) == ("sd2", "text_encoder")


@pytest.mark.parametrize(("family", "component"), ALL)
def test_diffusers_converter_gives_the_same_tensors(family, component) -> None:
    part, config = CONFIGS.get(family).parts[component], component_configs(family)[component]
    weights = spelled(build(component, config, kind=part.classes[0]))
    found = converted(part, weights, config)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("component", "tensors", "parameters"), [
    # sizes of the published Stable Diffusion 1.5; its file has one tensor more, the text encoder's position_ids
    ("unet", 686, 859_520_964), ("vae", 248, 83_653_863), ("text_encoder", 196, 123_060_480)])
def test_the_real_sizes(component, tensors, parameters) -> None:
    part = SD1.parts[component]
    entries = list(part.entries(part.config))
    assert len(entries) == tensors
    assert sum(math.prod(entry.shape) for entry in entries) == parameters
    assert len({entry.ldm for entry in entries}) == len({entry.name for entry in entries}) == tensors


#: keys of the published v1-5-pruned-emaonly.safetensors, a few of each kind
PUBLISHED = {
    "model.diffusion_model.time_embed.2.weight": (1280, 1280),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.4.0.emb_layers.1.weight": (640, 1280),
    "model.diffusion_model.input_blocks.11.0.out_layers.3.bias": (1280,),
    "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.bias": (1280,),
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.encoder.conv_out.weight": (8, 512, 3, 3),
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
}


def test_published_keys() -> None:
    keys = {part.prefix + entry.ldm: entry.ldm_shape
            for part in SD1.parts.values() for entry in part.entries(part.config)}
    assert {key: keys.get(key) for key in PUBLISHED} == PUBLISHED


def unet_of(widths: list[int], layers: int, depths: list[int], linear: bool, context: int) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config = copy.deepcopy(SD1.parts["unet"].config) | {
        "block_out_channels": widths, "layers_per_block": layers, "cross_attention_dim": context,
        "down_block_types": down, "up_block_types": [kind.replace("Down", "Up") for kind in down[::-1]],
        "use_linear_projection": linear, "norm_num_groups": 8, "attention_head_dim": 4,
    }
    if any(depth > 1 for depth in depths):
        config["transformer_layers_per_block"] = [depth or 1 for depth in depths]
    return config


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_any_number_of_levels(data) -> None:
    n = data.draw(st.integers(1, 4))
    widths = data.draw(st.lists(st.sampled_from([8, 16, 24, 32]), min_size=n, max_size=n))
    depths = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n).filter(any))
    config = unet_of(widths, data.draw(st.integers(1, 3)), depths, data.draw(st.booleans()), 24)
    entries = list(unet_entries(config))
    with torch.device("meta"):
        network = build("unet", config)
    assert {e.name: e.shape for e in entries} == {n: tuple(t.shape) for n, t in network.state_dict().items()}
    derived = unet_config({entry.ldm: entry.ldm_shape for entry in entries})
    assert {key: config.get(key, 1) for key in derived} == derived


@given(st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 16))
@settings(max_examples=10, deadline=None)
def test_any_vae(widths, layers, latents) -> None:
    n = len(widths)
    config = SD1.parts["vae"].config | {
        "block_out_channels": widths, "layers_per_block": layers, "latent_channels": latents, "norm_num_groups": 8,
        "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    entries = list(vae_entries(config))
    with torch.device("meta"):
        network = build("vae", config)
    assert {e.name: e.shape for e in entries} == {n: tuple(t.shape) for n, t in network.state_dict().items()}
    derived = vae_config({entry.ldm: entry.ldm_shape for entry in entries})
    assert {key: config[key] for key in derived} == derived


@pytest.mark.parametrize("size", ["mini", "real"])
def test_the_configuration_is_told_by_shapes(size) -> None:
    for name, part in SD1.parts.items():
        config = component_configs(size=size)[name]
        derived = part.derive({entry.ldm: entry.ldm_shape for entry in part.entries(config)})
        differing = {key for key, value in derived.items() if config[key] != value}
        assert differing <= set(part.untold), (name, differing)
        assert set(config) - set(derived) - set(part.untold) <= set(part.config)


def test_clips_have_heads_of_64() -> None:
    part = SD1.parts["text_encoder"]
    derived = clip_config({entry.ldm: entry.ldm_shape for entry in part.entries(part.config)})
    assert derived["num_attention_heads"] == 12


@pytest.mark.parametrize("changes", [
    {"class_embed_type": "timestep"}, {"addition_embed_type": "text_image"}, {"time_cond_proj_dim": 256},
    {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, {"layers_per_block": [1, 2, 2, 2]},
    {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4},
])
def test_networks_of_other_kinds_are_refused(changes) -> None:
    with pytest.raises(UserError, match="not supported"):
        list(unet_entries({**SD1.parts["unet"].config, **changes}))


@pytest.mark.parametrize("changes", [
    {"mid_block_add_attention": False}, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}])
def test_vaes_of_other_kinds_are_refused(changes) -> None:
    with pytest.raises(UserError, match="not supported"):
        list(vae_entries({**SD1.parts["vae"].config, **changes}))


def test_missing_blocks_are_told() -> None:
    shapes = {entry.ldm: entry.ldm_shape for entry in unet_entries(SD1.parts["unet"].config)}
    with pytest.raises(UserError, match="differ in their number of layers"):
        unet_config({name: shape for name, shape in shapes.items() if not name.startswith("input_blocks.11.")})
    with pytest.raises(UserError, match="lacks the tensor input_blocks.0.0.weight"):
        unet_config({})
    with pytest.raises(UserError, match="without cross-attention"):
        unet_config({name: shape for name, shape in shapes.items() if ".1.transformer" not in name})
