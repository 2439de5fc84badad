"""Adapters of SD 3 in every format, against the programs' own lists of keys and diffusers' own translation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted
from impasto.deltas.told import rank_of
from impasto.formats import mmdit_layers
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.detect import detect
from impasto.formats.header import read_header
from impasto.toolbox.convert import convert
from impasto.toolbox.mix import mix, resize
from tests.formats.adapter_cases import dense, worst
from tests.formats.kind_cases import MAKERS, filled
from tests.formats.sd3_cases import TEXT, keys, linear_layers, mini_clip, mini_transformer, networks, sd3_adapter

FORMATS = ("kohya", "comfyui", "onetrainer", "diffusers")
Q, K, V = (f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv")
QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


def dense32(adapter: Adapter) -> dict[str, Tensor]:
    return {layer: sum(term.weight().detach().double() for term in terms) for layer, terms in adapter.deltas.items()}


# --- kohya's file -----------------------------------------------------------------------------------------


def kohya_file() -> dict[str, Tensor]:
    """A random LoRA as networks/lora_sd3.py writes it."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (up, down) in keys("kohya").items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(up, generator=draw)
        tensors[f"{name}.lora_down.weight"] = torch.randn(down, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def as_diffusers_has_it(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Changes of weights by flat original names, through diffusers' translation of a checkpoint; of two blocks."""
    own = {name: mmdit_layers.original(name.removeprefix("lora_unet_")) for name in changes
           if name.startswith("lora_unet_")}
    checkpoint = {f"{path}.weight": changes[name] for name, path in own.items()}
    checkpoint |= {f"{path}.bias": torch.zeros(changes[name].shape[0]) for name, path in own.items()}
    checkpoint["pos_embed"] = torch.zeros(1, 4, 128)
    return {f"transformer.{key.removesuffix('.weight')}": value
            for key, value in convert_sd3_transformer_checkpoint_to_diffusers(checkpoint).items()
            if key.endswith(".weight")}


def test_kohyas_file_means_what_diffusers_makes_of_its_changes(tmp_path: Path) -> None:
    tensors = kohya_file()
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "5-medium"})
    adapter = load_adapter(tmp_path / "a.safetensors")
    changes = {name: (tensors[f"{name}.lora_up.weight"].flatten(1) @ tensors[f"{name}.lora_down.weight"].flatten(1) * (
        2.0 / down[0])).reshape(up[0], *down[1:]) for name, (up, down) in keys("kohya").items()}
    expected = as_diffusers_has_it(changes)
    found = {layer: change for layer, change in dense32(adapter).items() if layer.startswith("transformer.")}
    assert adapter.family == "sd3" and len(found) == len(expected) == 37
    assert worst(found, expected) < 1e-6
    text = {layer for layer in adapter.deltas if not layer.startswith("transformer.")}
    assert len(text) == 6 + 6 + 7 and "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0" in text
    detected = detect(tmp_path / "a.safetensors")
    assert (detected.kind, detected.family, detected.layout) == ("adapter", "sd3", "kohya")


def test_kohyas_file_is_written_as_it_was(tmp_path: Path) -> None:
    """The same keys and the same numbers, the fused layers at the rank that they had."""
    save_file(kohya_file(), tmp_path / "a.safetensors")
    save_adapter(load_adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", dtype=torch.float32)
    one, other = kohya_file(), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_metadata_of_kohyas_file(tmp_path: Path) -> None:
    metadata = {}
    for layers in ([Q], [Q.replace("attn", "attn2")], [Q.replace("blocks.0", "blocks.30")]):
        adapter = Adapter({layer: (LowRank.from_factors(torch.ones(6, 1), torch.ones(1, 6)),) for layer in layers})
        save_adapter(adapter, tmp_path / "a.safetensors")
        metadata = read_header(tmp_path / "a.safetensors").metadata
        version = metadata["ss_base_model_version"]
        assert version == {Q: "sd3"}.get(layers[0], "5-medium" if "attn2" in layers[0] else "5-large")
        ending = "" if version == "sd3" else f"-{version}"
        assert metadata["modelspec.architecture"] == f"stable-diffusion-3{ending}/lora"
        assert load_adapter(tmp_path / "a.safetensors").family == "sd3"
    assert metadata["ss_network_module"] == "networks.lora_sd3" and "modelspec.prediction_type" not in metadata
    save_adapter(sd3_adapter(alpha=2.0), tmp_path / "b.safetensors")
    assert {key.partition("_")[2][:3] for key in read_header(tmp_path / "b.safetensors").tensors} == {
        "une", "te1", "te2", "te3"}


# --- fused layers -----------------------------------------------------------------------------------------


def pair(out: int, rank: int, seed: int, into: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=draw), torch.randn(rank, into, generator=draw)


def test_a_fused_lora_is_three_with_one_down(tmp_path: Path) -> None:
    up, down = pair(12, 3, 0)
    save_file({f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert set(adapter.deltas) == {Q, K, V}
    for layer, rows in zip((Q, K, V), up.chunk(3), strict=True):
        (term,) = adapter.deltas[layer]
        assert torch.equal(term.tensors()["up"], rows) and torch.equal(term.tensors()["down"], down)


def test_three_different_loras_stand_in_blocks(tmp_path: Path) -> None:
    """And come back as they were; a missing one has rows of zeros."""
    terms = {layer: LowRank.from_factors(*pair(4, rank, rank), alpha=alpha)
             for layer, rank, alpha in ((Q, 2, 3.0), (V, 3, 0.7))}
    adapter = Adapter({layer: (term,) for layer, term in terms.items()})
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    found = load_file(tmp_path / "a.safetensors")
    up = found[f"{QKV}.lora_up.weight"]
    assert up.shape == (12, 5) and float(found[f"{QKV}.alpha"]) == 5
    assert not up[4:8].any() and not up[:4, 2:].any() and not up[8:, :2].any()
    again = load_adapter(tmp_path / "a.safetensors")
    assert worst(dense(again), dense(adapter)) < 1e-6
    assert [term.tensors()["down"].shape[0] for (term,) in again.deltas.values()] == [2, 3]


def test_the_sum_of_loras_on_one_of_them(tmp_path: Path) -> None:
    adapter = Adapter({Q: tuple(LowRank.from_factors(*pair(4, 2, seed)) for seed in range(2)),
                       K: (LowRank.from_factors(*pair(4, 2, 5)),)}, family="sd3")
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    assert worst(dense(load_adapter(tmp_path / "a.safetensors")), dense(adapter)) < 1e-6


def test_an_untrained_fused_lora_keeps_its_layers(tmp_path: Path) -> None:
    save_file({f"{QKV}.lora_up.weight": torch.zeros(12, 2), f"{QKV}.lora_down.weight": torch.ones(2, 5)},
              tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors").deltas) == {Q, K, V}
    save_adapter(Adapter({Q: (LowRank.from_factors(torch.zeros(4, 2), torch.ones(2, 5)),)}), tmp_path / "b.safetensors")
    assert Q in load_adapter(tmp_path / "b.safetensors").deltas


def test_biases_of_fused_and_swapped_layers(tmp_path: Path) -> None:
    last, out = "transformer.transformer_blocks.23.norm1_context.linear", "transformer.norm_out.linear"
    deltas = {K: (Dense.from_weight(None, torch.arange(4.0)),),
              V: (Dense.from_weight(torch.ones(4, 5), torch.ones(4)),),
              last: (Dense.from_weight(torch.randn(8, 4), torch.arange(8.0)),),
              out: (Dense.from_weight(None, torch.arange(8.0)),)}
    save_adapter(Adapter(dict(deltas)), tmp_path / "a.safetensors", dtype=torch.float32)
    found = load_file(tmp_path / "a.safetensors")
    assert found[f"{QKV}.diff_b"].tolist() == [0] * 4 + [0, 1, 2, 3] + [1] * 4
    swapped = [4, 5, 6, 7, 0, 1, 2, 3]
    assert found["lora_unet_final_layer_adaLN_modulation_1.diff_b"].tolist() == swapped
    assert found["lora_unet_joint_blocks_23_context_block_adaLN_modulation_1.diff_b"].tolist() == swapped
    again = load_adapter(tmp_path / "a.safetensors")
    assert set(again.deltas) == set(deltas)
    for layer, (term,) in deltas.items():
        assert torch.equal(sum(t.bias() for t in again.deltas[layer] if t.bias() is not None), term.bias())
    alone = Adapter({last: (Dense.from_weight(None, torch.arange(8.0)),)})
    with pytest.raises(UserError, match="which halves|does not tell"):
        save_adapter(alone, tmp_path / "b.safetensors")


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("format", ["kohya", "comfyui", "onetrainer"])
def test_every_kind_keeps_its_change(kind: str, format: str, tmp_path: Path) -> None:
    """On all layers; what files with fused layers have no place for is refused."""
    draw, transformer = torch.Generator().manual_seed(1), mini_transformer()
    deltas = {layer: (filled(MAKERS[kind](transformer.get_submodule(layer.partition(".")[2])), draw),)
              for layer in linear_layers()}
    adapter = Adapter(deltas, family="sd3")
    if kind == "dora-in" and format != "onetrainer":
        with pytest.raises(UserError, match="magnitude for each"):
            save_adapter(adapter, tmp_path / "a.safetensors", format=format, dtype=torch.float32)
        return
    save_adapter(adapter, tmp_path / "a.safetensors", format=format, dtype=torch.float32)
    again = load_adapter(tmp_path / "a.safetensors")
    assert set(again.deltas) == set(deltas)
    for layer, (term,) in deltas.items():
        W = transformer.get_submodule(layer.partition(".")[2]).weight.double()
        ours = sum(t.weight(W).double().reshape(W.shape) for t in again.deltas[layer] if t.shape)
        assert float((ours - term.weight(W).double()).norm()) <= 1e-6 * float(W.norm() + term.weight(W).norm()), layer


def test_norms_without_a_bias_get_none(tmp_path: Path) -> None:
    layers = ["transformer.transformer_blocks.0.attn.norm_added_q", "transformer.transformer_blocks.0.attn2.norm_k",
              "text_encoder_3.encoder.block.0.layer.0.layer_norm"]
    adapter = Adapter({layer: (Dense.from_weight(torch.ones(8)),) for layer in layers})
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == {
        "lora_unet_joint_blocks_0_context_block_attn_ln_q.w_norm", "lora_unet_joint_blocks_0_x_block_attn2_ln_k.w_norm",
        "lora_te3_encoder_block_0_layer_0_layer_norm.w_norm"}
    assert set(load_adapter(tmp_path / "a.safetensors").deltas) == set(layers)


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    up, down = torch.ones(12, 1), torch.ones(1, 5)
    both = {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down,
            "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight": up[:4].clone(),
            "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight": down.clone()}
    uneven = {f"{QKV}.lora_up.weight": torch.ones(11, 1), f"{QKV}.lora_down.weight": down}
    scaled = {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down, f"{QKV}.dora_scale": torch.ones(1, 5)}
    for tensors, line in ((both, "twice"), (uneven, "equal parts"), (scaled, "magnitude for each input")):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=line):
            load_adapter(tmp_path / "a.safetensors")


# --- ComfyUI's and OneTrainer's names ---------------------------------------------------------------------


def test_every_layer_has_the_place_that_comfyui_gives_it() -> None:
    for path, (whole, *how) in keys("comfyui").items():
        parts = mmdit_layers.parts(whole)
        assert mmdit_layers.original(whole) == mmdit_layers.original(whole.replace(".", "_")) == whole
        assert parts[how[0] // 128 if len(how) == 2 else 0] == path
        assert (len(parts) == 3) == (len(how) == 2)


def test_comfyuis_keys(tmp_path: Path) -> None:
    save_adapter(sd3_adapter(), tmp_path / "a.safetensors", format="comfyui", dtype=torch.float32)
    names = {key.removesuffix(".alpha") for key in load_file(tmp_path / "a.safetensors") if key.endswith(".alpha")}
    wholes = {f"diffusion_model.{whole}" for whole, *_ in keys("comfyui").values()}
    blocks = {name for name in names if name.startswith("diffusion_model.") and ".2." not in name}
    assert {name for name in blocks if "joint_blocks.0" in name or "joint" not in name} <= wholes
    assert {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.out_proj",
            "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wi_1"} <= names
    found = detect(tmp_path / "a.safetensors")
    assert (found.family, found.layout) == ("sd3", "comfyui")


@pytest.mark.parametrize("spelling", ["omi", "dotted", "flat"])
def test_onetrainers_names(spelling: str, tmp_path: Path) -> None:
    """That all of them mean the layers that their flat ones do; halves are swapped where the path is the original."""
    column = ("dotted", "flat").index(spelling) if spelling != "omi" else None
    tensors, up = {}, torch.cat([torch.zeros(4, 1), torch.ones(4, 1)])
    for omi, others in keys("onetrainer").items():
        name = omi if column is None else others[column]
        tensors |= {f"{name}.lora_up.weight": up.clone(), f"{name}.lora_down.weight": torch.ones(1, 4),
                    f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    heads = {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3",
             "lora_transformer": "transformer"}
    expected = {f"{heads[dotted.partition('.')[0]]}.{dotted.partition('.')[2]}": dotted
                for dotted, _ in keys("onetrainer").values()}
    assert set(adapter.deltas) == set(expected) and adapter.family == "sd3"
    for layer, (term,) in adapter.deltas.items():
        swapped = spelling == "omi" and layer.endswith(("norm_out.linear", "norm1_context.linear"))
        assert torch.equal(term.tensors()["up"].flatten(), up.flatten().flip(0) if swapped else up.flatten())
    assert detect(tmp_path / "a.safetensors").family == "sd3"


def test_more_files_of_onetrainer(tmp_path: Path) -> None:
    """As it holds them in memory, with DoRA and new tokens; original paths alone; its ComfyUI format."""
    up, down = pair(4, 2, 0)
    plain = {f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down, f"{Q}.alpha": torch.tensor(1.0)}
    save_file(plain | {f"{Q}.dora_scale": torch.ones(4, 1), "bundle_emb.sks.clip_l": torch.ones(1, 8)},
              tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.deltas[Q][0].kind == "dora" and set(adapter.embeddings) == {"sks"}
    whole, body = "joint_blocks.0.x_block.attn.qkv", {}
    for name in (whole, f"diffusion_model.{whole}"):
        body = {f"{name}.lora_B.weight": torch.cat([up] * 3), f"{name}.lora_A.weight": down,
                f"{name}.alpha": torch.tensor(1.0)}
        save_file(body, tmp_path / "b.safetensors")
        adapter = load_adapter(tmp_path / "b.safetensors")
        assert set(adapter.deltas) == {Q, K, V} and adapter.family == "sd3"
        assert torch.allclose(adapter.deltas[K][0].weight(), up @ down / 2)


def test_onetrainers_names_of_a_unet(tmp_path: Path) -> None:
    up, down = pair(4, 2, 0)
    for name, layer in (("unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
                         "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
                        ("unet.down_blocks.0.resnets.0.time_emb_proj", "unet.down_blocks.0.resnets.0.time_emb_proj"),
                        ("clip_l.text_model.encoder.layers.0.mlp.fc1",
                         "text_encoder.text_model.encoder.layers.0.mlp.fc1")):
        save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a.safetensors")
        assert load_adapter(tmp_path / "a.safetensors").layers == [layer]


def test_simpletuners_names(tmp_path: Path) -> None:
    save_file({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(2, 2),
               "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.layers == [Q] and adapter.family == "sd3"


# --- other families whose layers are called alike ---------------------------------------------------------


@pytest.mark.parametrize("other", [
    {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072),
     "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (3072, 4)},
    {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536),
     "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536)},
    {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 1152)},
])
def test_others_are_not_taken_for_sd3(other: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    save_file({key: torch.ones(shape) for key, shape in other.items()}, tmp_path / "a.safetensors")
    assert detect(tmp_path / "a.safetensors").family == ""


# --- diffusers and peft -----------------------------------------------------------------------------------


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


# --- from format to format --------------------------------------------------------------------------------


def test_every_way_around_keeps_every_change(tmp_path: Path) -> None:
    adapter = sd3_adapter()
    for first in FORMATS:
        save_adapter(adapter, tmp_path / f"{first}.safetensors", format=first, dtype=torch.float32)
        for second in FORMATS:
            out = tmp_path / f"{first}-{second}.safetensors"
            save_adapter(load_adapter(tmp_path / f"{first}.safetensors"), out, format=second, dtype=torch.float32)
            again = load_adapter(out)
            assert again.family == "sd3" and worst(dense32(again), dense(adapter)) < 1e-6, (first, second)


def test_convert_from_kohyas_to_diffusers_and_back(tmp_path: Path) -> None:
    save_file(kohya_file(), tmp_path / "a.safetensors")
    wanted = dense32(load_adapter(tmp_path / "a.safetensors"))
    source = tmp_path / "a.safetensors"
    for i, to in enumerate(("diffusers", "comfyui", "peft", "kohya")):
        out = tmp_path / (f"out{i}" if to == "peft" else f"out{i}.safetensors")
        convert(source, out, to=to, dtype=torch.float32)
        assert worst(dense32(load_adapter(out)), wanted) < 1e-6, to
        source = out
    found = load_file(source)
    assert found.keys() == kohya_file().keys()
    assert found[f"{QKV}.lora_down.weight"].shape == (4, 128)


def test_sums_and_lower_ranks(tmp_path: Path) -> None:
    """Of files of two formats."""
    one, other = sd3_adapter(), sd3_adapter(alpha=2.0)
    save_adapter(one, tmp_path / "a.safetensors", dtype=torch.float32)
    save_adapter(other, tmp_path / "b.safetensors", format="diffusers", dtype=torch.float32)
    files = [Weighted(str(tmp_path / "a.safetensors"), 0.7), Weighted(str(tmp_path / "b.safetensors"), -0.4)]
    mix(files, tmp_path / "out.safetensors", dtype=torch.float32)
    wanted = {layer: 0.7 * change - 0.4 * dense(other)[layer] for layer, change in dense(one).items()}
    assert worst(dense32(load_adapter(tmp_path / "out.safetensors")), wanted) < 1e-5
    resize(tmp_path / "out.safetensors", Wanted(rank=2), tmp_path / "small.safetensors", dtype=torch.float32)
    found = load_adapter(tmp_path / "small.safetensors")
    assert {rank_of(term) for (term,) in found.deltas.values()} <= {1, 2}
    for layer, change in dense32(found).items():
        left = torch.linalg.svdvals(wanted[layer].flatten(1))[2:].norm()
        assert float((change - wanted[layer]).norm()) <= float(left) + 1e-5 * float(wanted[layer].norm())


def test_text_encoders_have_their_layers(tmp_path: Path) -> None:
    save_adapter(sd3_adapter([Q]), tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors").layers) == {Q, *(f"{c}.{path}" for c, path in TEXT.items())}
