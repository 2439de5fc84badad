"""SD 3's names and shapes in both layouts, against diffusers' networks and diffusers' own converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from impasto.core.errors import UserError
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.configs import CONFIGS, FamilyConfig
from impasto.formats.mmdit import mmdit_config, mmdit_entries
from impasto.formats.rewrite import rewrite
from impasto.toolbox.convert import convert
from impasto.toolbox.layouts import to_folder
from tests.checkpoints import SD35, built, component_configs, spelled, untold, write_checkpoint
from tests.formats.checkpoint_cases import equal, one_line, tensors_of

SD3: FamilyConfig = CONFIGS.get("sd3")
#: of the published networks, what differs from SD 3 medium
PUBLISHED: dict[str, dict[str, Any]] = {
    "3 medium": {},
    "3.5 medium": {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
    "3.5 large": {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
}


def ldm_weights(component: str, weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The same weights under the keys of a single file."""
    part, held = SD3.parts[component], dict[str, Tensor]()
    for entry in part.entries(config):
        if entry.how != "identity":
            tensor = weights[entry.name]
            tensor = torch.cat(tensor.chunk(2)[::-1]) if entry.how == "halves" else tensor
            whole = held.setdefault(part.prefix + entry.ldm, torch.empty(entry.ldm_shape))
            whole.chunk(entry.piece[1])[entry.piece[0]].copy_(tensor.reshape(-1, *entry.ldm_shape[1:]))
    return held


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def converted(component: str, keys: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """What diffusers' converter makes of them."""
    match component:
        case "transformer":
            return convert_sd3_transformer_checkpoint_to_diffusers(keys)
        case "text_encoder_3":
            return convert_sd3_t5_checkpoint_to_diffusers(keys)
        case "vae":
            return convert_ldm_vae_checkpoint(keys, config)
    found = convert_ldm_clip_checkpoint(keys, SD3.parts[component].prefix)
    if component == "text_encoder":  # as `create_diffusers_clip_model_from_ldm` does
        found["text_projection.weight"] = torch.eye(config["hidden_size"])
    return found


@pytest.mark.parametrize("changes", [{}, SD35], ids=["3", "3.5"])
@pytest.mark.parametrize("component", list(SD3.parts))
def test_diffusers_converter_gives_the_same_tensors(component: str, changes: dict[str, Any]) -> None:
    config = component_configs("sd3", changes=changes)[component]
    weights = spelled(built("sd3", component, config))
    found = converted(component, ldm_weights(component, weights, config), config)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_networks(model: str) -> None:
    config = SD3.parts["transformer"].config | PUBLISHED[model]
    with torch.device("meta"):
        weights = spelled(built("sd3", "transformer", config))
    entries = list(mmdit_entries(config))
    assert {entry.name: entry.shape for entry in entries} == shapes_of(weights)
    assert mmdit_config({entry.ldm: entry.ldm_shape for entry in entries}) == {
        key: value for key, value in config.items() if key != "sample_size"}


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"])
def test_the_other_published_networks(component: str) -> None:
    part = SD3.parts[component]
    with torch.device("meta"):
        weights = spelled(built("sd3", component, part.config))
    entries = list(part.entries(part.config))
    assert {entry.name: entry.shape for entry in entries} == shapes_of(weights)
    derived = part.derive({entry.ldm: entry.ldm_shape for entry in entries if entry.how != "identity"})
    assert {key: part.config[key] for key in derived} == derived


#: keys of the published sd3_medium_incl_clips_t5xxlfp16.safetensors and sd3.5_medium.safetensors, a few of each kind
KEYS = {
    "model.diffusion_model.pos_embed": (1, 36864, 1536),
    "model.diffusion_model.x_embedder.proj.weight": (1536, 16, 2, 2),
    "model.diffusion_model.t_embedder.mlp.0.weight": (1536, 256),
    "model.diffusion_model.y_embedder.mlp.0.weight": (1536, 2048),
    "model.diffusion_model.context_embedder.weight": (1536, 4096),
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
    "model.diffusion_model.joint_blocks.22.context_block.attn.proj.weight": (1536, 1536),
    "model.diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
    "model.diffusion_model.joint_blocks.23.context_block.attn.qkv.bias": (4608,),
    "model.diffusion_model.joint_blocks.23.x_block.mlp.fc1.weight": (6144, 1536),
    "model.diffusion_model.final_layer.adaLN_modulation.1.weight": (3072, 1536),
    "model.diffusion_model.final_layer.linear.weight": (64, 1536),
    "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
    "first_stage_model.encoder.conv_out.weight": (32, 512, 3, 3),
    "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "text_encoders.clip_g.transformer.text_projection.weight": (1280, 1280),
    "text_encoders.t5xxl.transformer.shared.weight": (32128, 4096),
    "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
}
KEYS_35 = {
    "model.diffusion_model.pos_embed": (1, 147456, 1536),
    "model.diffusion_model.joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
    "model.diffusion_model.joint_blocks.12.x_block.attn2.ln_q.weight": (64,),
    "model.diffusion_model.joint_blocks.23.context_block.attn.ln_k.weight": (64,),
}


def test_published_keys() -> None:
    keys = {part.prefix + entry.ldm: entry.ldm_shape for part in SD3.parts.values()
            for entry in part.entries(part.config) if entry.how != "identity"}
    assert {key: keys.get(key) for key in KEYS} == KEYS
    assert not any("quant_conv" in key or "clip_l.transformer.text_projection" in key for key in keys)
    newer = {"model.diffusion_model." + entry.ldm: entry.ldm_shape
             for entry in mmdit_entries(SD3.parts["transformer"].config | PUBLISHED["3.5 medium"])}
    assert {key: newer.get(key) for key in KEYS_35} == KEYS_35


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([None, "rms_norm"]), st.sets(st.integers(0, 3)))
@settings(max_examples=8, deadline=None)
def test_any_transformer(layers: int, heads: int, norm: str | None, dual: set[int]) -> None:
    config = SD3.parts["transformer"].config | {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64, "qk_norm": norm,
        "caption_projection_dim": heads * 64, "joint_attention_dim": 24, "pooled_projection_dim": 12,
        "pos_embed_max_size": 6, "dual_attention_layers": sorted(i for i in dual if i < layers)}
    with torch.device("meta"):
        weights = spelled(built("sd3", "transformer", config))
    entries = list(mmdit_entries(config))
    assert {entry.name: entry.shape for entry in entries} == shapes_of(weights)
    derived = mmdit_config({entry.ldm: entry.ldm_shape for entry in entries})
    assert {key: config[key] for key in derived} == derived


@pytest.mark.parametrize("changes", [{"qk_norm": "layer_norm"}, {"caption_projection_dim": 8}])
def test_networks_of_other_kinds_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not supported"):
        list(mmdit_entries({**SD3.parts["transformer"].config, **changes}))


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", [(), ("text_encoder_3",)], ids=["T5", "no T5"])
@pytest.mark.parametrize("changes", [{}, SD35], ids=["3", "3.5"])
def test_both_layouts_hold_the_same(changes: dict[str, Any], without: tuple[str, ...], tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "x.safetensors", "sd3", changes=changes, without=without)
    folder = write_checkpoint(tmp_path / "x", "sd3", layout="diffusers", changes=changes, without=without)
    one, other = open_checkpoint(file), open_checkpoint(folder)
    assert (one.family, one.surplus, other.family, other.surplus) == ("sd3", [], "sd3", [])
    assert equal(tensors_of(one), tensors_of(other))
    for component in one.components:
        for name in ("text_projection.weight", next(iter(one.names(component)))):
            if name in one.names(component):
                assert torch.equal(one.tensor(component, name), other.tensor(component, name))


@pytest.mark.parametrize("changes", [{}, SD35], ids=["3", "3.5"])
def test_from_layout_to_layout(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", "sd3", layout="diffusers", changes=changes)
    file = write_checkpoint(tmp_path / "theirs.safetensors", "sd3", changes=changes)
    convert(folder, tmp_path / "out.safetensors")
    found, theirs = load_file(tmp_path / "out.safetensors"), load_file(file)
    assert found.keys() == theirs.keys() and all(torch.equal(found[key], theirs[key]) for key in theirs)
    with pytest.raises(UserError, match="has no tokenizer_3, the tokenizer of its text_encoder_3; put the folder"):
        convert(tmp_path / "out.safetensors", tmp_path / "again")
    (folder / "tokenizer_3").rename(tmp_path / "tokenizer_3")
    convert(tmp_path / "out.safetensors", tmp_path / "again")
    assert equal(tensors_of(open_checkpoint(tmp_path / "again")), tensors_of(open_checkpoint(file)))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "again")
    theirs = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in pipeline.transformer.state_dict().items())
    assert pipeline.tokenizer_3("a photo of sks dog").input_ids == [4, 5, 6, 10, 8, 1]


def test_without_t5_a_folder_says_that_there_is_none(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "x.safetensors", "sd3", without=("text_encoder_3",)), tmp_path / "x")
    # as diffusers writes it itself; it wants to be told, too
    assert json.loads((tmp_path / "x" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "x", text_encoder_3=None, tokenizer_3=None)
    assert pipeline.text_encoder_2.config.projection_dim == 128
    convert(tmp_path / "x", tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / "x.safetensors").keys()


def test_what_a_single_file_has_no_place_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "x", "sd3", layout="diffusers")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    told = scheduler.read_text()
    scheduler.write_text(told.replace("3.0", "1.0"))
    with pytest.raises(UserError, match="has a shift of 1.0, and a single file stands for 3.0"):
        convert(folder, tmp_path / "out.safetensors")
    scheduler.write_text(told)
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights["text_projection.weight"] *= 2
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="text_projection.weight of its own"):
        convert(folder, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["shared", "encoder.embed_tokens"])
def test_t5s_words_have_two_names(name: str, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "x.safetensors", "sd3")
    other = {"shared": "encoder.embed_tokens", "encoder.embed_tokens": "shared"}[name]
    told, weights = open_checkpoint(file).metadata, load_file(file)
    del weights[f"text_encoders.t5xxl.transformer.{other}.weight"]
    save_file(weights, tmp_path / "y.safetensors", told)
    opened = open_checkpoint(tmp_path / "y.safetensors")
    assert (opened.surplus, opened.unused) == ([], []) and equal(tensors_of(opened), tensors_of(open_checkpoint(file)))


def test_what_is_changed_on_the_way_is_changed_in_its_place(tmp_path: Path) -> None:
    """Rows of a matrix of three, and halves the other way round."""
    file = write_checkpoint(tmp_path / "x.safetensors", "sd3", changes=SD35)
    wanted = tensors_of(open_checkpoint(file))
    blocks = ("0.attn.to_k", "1.attn2.to_q", "2.norm1_context.linear")
    names = [f"transformer.{name}.weight" for name in (*(f"transformer_blocks.{block}" for block in blocks),
                                                       "norm_out.linear", "pos_embed.proj")]
    changes = {name: torch.randn_like(wanted[name]) for name in names}
    rewrite(open_checkpoint(file), tmp_path / "y.safetensors", lambda component, name, tensor: None if
            (change := changes.get(f"{component}.{name}")) is None else tensor + change)
    wanted |= {name: wanted[name] + change for name, change in changes.items()}
    assert equal(tensors_of(open_checkpoint(tmp_path / "y.safetensors")), wanted)


def test_a_transformer_alone_and_what_is_incomplete(tmp_path: Path) -> None:
    configs = component_configs("sd3")
    weights = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in ldm_weights(
        "transformer", spelled(built("sd3", "transformer", configs["transformer"])), configs["transformer"]).items()}
    told = {"impasto.config": untold("sd3", {"transformer": configs["transformer"]})}
    save_file(weights, tmp_path / "bare.safetensors", told)
    assert open_checkpoint(tmp_path / "bare.safetensors").components == ("transformer",)
    del weights["joint_blocks.1.x_block.attn.qkv.bias"]
    save_file(weights, tmp_path / "bare.safetensors", told)
    assert "lacks 3 of" in one_line(tmp_path / "bare.safetensors")
    save_file(weights | {"joint_blocks.1.x_block.attn.qkv.bias": torch.zeros(48)}, tmp_path / "bare.safetensors", told)
    with pytest.raises(UserError, match="holds no text_encoder and no text_encoder_2 and no vae"):
        to_folder(open_checkpoint(tmp_path / "bare.safetensors"), tmp_path / "out")
