"""Verdicts on SD 2, SDXL, its refiner and SD 3, each with all of its layers.

diffusers runs for real. The other numbers are what comes of running the programs' own code on the same keys: A1111's
and Forge's maps of names, kohya's `create_network_from_weights` of networks/lora.py and lora_sd3.py, LyCORIS' of
kohya.py; ComfyUI's map has Forge's names and those of its own that are added here by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.lowrank import LowRank
from impasto.formats import original, programs
from impasto.formats.adapters import save_adapter
from tests.formats.family_cases import (
    KOHYA,
    PEFT,
    carried,
    comfyui,
    file_of,
    joint,
    kohya,
    layers,
    own,
    sd3,
    sdxl,
)

UNET, TEXTS = 794, 265  # of SDXL; the second text encoder's projection is the last of the 265


def loaded(keys: Iterable[str], family: str) -> dict[str, int]:
    return {verdict.program: verdict.loaded for verdict in programs.verdicts(keys, family=family)}


def by(a1111: int, forge: int, comfyui: int, kohya: int, diffusers: int) -> dict[str, int]:
    return {"A1111": a1111, "Forge": forge, "ComfyUI": comfyui, "kohya": kohya, "diffusers": diffusers}


#: spelling -> a file of every layer, and who loads how many
XL = {
    # the projection A1111 and kohya leave out, and kohya the six layers at the UNet's ends
    "own": (own("sdxl"), KOHYA, by(1058, 1059, 1059, 1052, 1059)),
    # two layers of the added embedding; A1111 also misses the first upsampler
    "kohya": (kohya, KOHYA, by(1055, 1059, 1059, 1052, 1057)),
    # of 560 layers in attention ComfyUI has other dotted names
    "diffusers": (str, PEFT, by(0, 0, UNET - 560 + TEXTS - 1, 0, 1059)),
    "comfyui": (comfyui("sdxl"), KOHYA, by(0, 0, 1059, 0, 0)),
}


@pytest.mark.parametrize("spelling", XL)
def test_sdxl(spelling: str) -> None:
    name, endings, want = XL[spelling]
    pipe = sdxl("sdxl")
    every = layers(pipe)
    assert len(every) == UNET + TEXTS
    tensors = file_of(every, name, endings)
    assert loaded(tensors, "sdxl") == want
    if spelling == "comfyui":
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            pipe.load_lora_weights(tensors)
    else:
        pipe.load_lora_weights(tensors)
    assert len(carried(pipe)) == want["diffusers"]


def test_forge_loads_comfyuis_names_of_the_unet_alone() -> None:
    unet = {layer: module for layer, module in layers(sdxl("sdxl")).items() if layer.startswith("unet.")}
    assert loaded(file_of(unet, comfyui("sdxl")), "sdxl") == by(0, UNET, UNET, 0, 0)


def test_the_refiner() -> None:
    """kohya has no such network; ComfyUI and Forge call its only text encoder the first."""
    pipe = sdxl("sdxl-refiner")
    every = layers(pipe)
    own_names = file_of(every, own("sdxl-refiner"))
    assert len(every) == 747
    assert loaded(own_names, "sdxl-refiner") == by(554, 0, 555, 0, 0)
    told = {v.program: v.caution for v in programs.verdicts(own_names, family="sdxl-refiner")}
    assert told["kohya"] == "does not load adapters of an SDXL refiner"
    assert told["Forge"] == "loads nothing of a file with 576 keys that it does not know"
    assert "block 1 and block 10" in told["diffusers"]
    with pytest.raises(KeyError, match="input_blocks_10"):
        pipe.load_lora_weights(dict(own_names))
    as_first = {key.replace("lora_te2_text_model", "lora_te_text_model"): 0 for key in own_names}
    assert loaded(as_first, "sdxl-refiner") == by(554, 747, 747, 0, 0)


@pytest.mark.parametrize(("name", "endings", "want"), [
    (kohya, KOHYA, by(552, 0, 555, 0, 745)), (str, PEFT, by(0, 0, 202, 0, 747))])
def test_the_refiner_in_diffusers_names(name: Callable[[str], str], endings: tuple[str, ...], want: dict[str, int]
                                        ) -> None:
    pipe = sdxl("sdxl-refiner")
    tensors = file_of(layers(pipe), name, endings)
    assert loaded(tensors, "sdxl-refiner") == want
    pipe.load_lora_weights(tensors)
    assert len(carried(pipe)) == want["diffusers"]


def test_the_refiners_attention_in_its_authors_names() -> None:
    pipe = sdxl("sdxl-refiner")
    attention = {layer: module for layer, module in layers(pipe).items() if ".attn" in layer}
    tensors = file_of(attention, own("sdxl-refiner"))
    assert loaded(tensors, "sdxl-refiner") == by(n := len(attention), n, n, 0, n)
    pipe.load_lora_weights(tensors)
    assert len(carried(pipe)) == len(attention) > 300


@pytest.mark.parametrize("head", ["lora_te_", "lora_te1_"])
def test_the_refiners_text_encoder_without_its_number(head: str) -> None:
    """ComfyUI and Forge find it under the first of these; diffusers takes both for an encoder that is not there."""
    pipe = sdxl("sdxl-refiner")
    attention = {layer: module for layer, module in layers(pipe).items() if "attn" in layer}
    tensors = {key.replace("lora_te2_", head): tensor
               for key, tensor in file_of(attention, own("sdxl-refiner")).items()}
    unet, n = sum(layer.startswith("unet.") for layer in attention), len(attention)
    found = n if head == "lora_te_" else unet
    assert loaded(tensors, "sdxl-refiner") == by(unet, found if found == n else 0, found, 0, 0)
    told = {v.program: v.caution for v in programs.verdicts(tensors, family="sdxl-refiner")}
    assert told["diffusers"] == "fails on the refiner's text encoder where it bears no number"
    with pytest.raises(AttributeError, match="named_modules"):
        pipe.load_lora_weights(tensors)


def test_what_is_written_of_the_refiner(tmp_path: Path) -> None:
    """Whole in ComfyUI and in Forge, in diffusers by its own format."""
    every = layers(sdxl("sdxl-refiner"))
    deltas: dict[str, tuple[Delta, ...]] = {layer: (LowRank(tuple(module.get_parameter("weight").shape), 1),)
                                            for layer, module in every.items() if "attn" in layer}
    for format, want in (("kohya", (len(deltas), len(deltas), 0)), ("diffusers", (0, 0, len(deltas)))):
        save_adapter(Adapter(deltas, family="sdxl-refiner"), path := tmp_path / f"{format}.safetensors", format=format)
        found = {v.program: v.loaded for v in programs.of_file(path)}
        assert (found["Forge"], found["ComfyUI"], found["diffusers"]) == want


def test_sdxl_in_lycoris_kinds() -> None:
    """The extension finds modules by their own names, so none under diffusers', and finds those at the ends too."""
    every = layers(sdxl("sdxl"))
    for name, found in ((own("sdxl"), 1059), (kohya, TEXTS)):
        keys = [name(layer) + ending for layer in every for ending in (".lokr_w1", ".lokr_w2", ".alpha")]
        assert loaded(keys, "sdxl")["kohya"] == found
        assert loaded(keys, "sdxl")["diffusers"] == 0


def test_our_own_file_of_sdxl(tmp_path: Path) -> None:
    """What `save_adapter` writes is loaded whole by all that know every layer."""
    deltas: dict[str, tuple[Delta, ...]] = {
        f"unet.{path}": (LowRank.from_factors(torch.ones(2, 1), torch.ones(1, 3)),)
        for path in original.originals("sdxl") if "norm" not in path}
    save_adapter(Adapter(deltas, family="sdxl"), tmp_path / "a.safetensors")
    counts = {v.program: v.loaded for v in programs.of_file(tmp_path / "a.safetensors")}
    assert counts == by(UNET, UNET, UNET, UNET - 6, UNET)


def test_sd2() -> None:
    """As SD 1, but for the text encoder: A1111 has OpenCLIP's, and ComfyUI calls it clip_h."""
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_0_"
    names = [block, f"{text}self_attn_q_proj", f"{text}mlp_fc2", "lora_unet_conv_in"]
    keys = [name + ending for name in names for ending in KOHYA]
    assert loaded(keys, "sd2") == loaded(keys, "sd1") == by(4, 4, 4, 3, 4)
    norms = [f"{text}layer_norm1.{part}" for part in ("w_norm", "b_norm")]
    assert loaded(norms, "sd2") == by(0, 0, 0, 1, 0) and loaded(norms, "sd1") == by(1, 0, 0, 1, 0)
    for encoder, family in (("clip_h", "sd2"), ("clip_l", "sd1")):
        path = f"text_encoders.{encoder}.transformer.text_model.encoder.layers.0.mlp.fc1"
        keys = [path + ending for ending in KOHYA]
        assert loaded(keys, family)["ComfyUI"] == 1 and loaded(keys, "sdxl")["ComfyUI"] == (encoder == "clip_l")
        assert loaded(keys, {"sd1": "sd2", "sd2": "sd1"}[family])["ComfyUI"] == 0


def test_sd3_in_diffusers_names() -> None:
    """A1111 knows the picture's attention alone, Forge and kohya nothing."""
    pipe = sd3()
    every = layers(pipe)
    network = {layer: module for layer, module in every.items() if layer.startswith("transformer.")}
    assert len(network) == 341
    tensors = file_of(network, str, PEFT)
    assert loaded(tensors, "sd3") == by(24 * 4, 0, 341, 0, 341)
    pipe.load_lora_weights(tensors)
    assert carried(pipe) == set(network)
    assert loaded(file_of(network, lambda layer: layer.replace("transformer.", "base_model.model.", 1), PEFT), "sd3") \
        == by(0, 0, 341, 0, 0)
    assert loaded(file_of(network, kohya), "sd3") == by(0, 0, 341, 0, 0)
    whole = sd3()
    whole.load_lora_weights(file_of(every, str, PEFT))
    assert len(carried(whole)) == loaded(file_of(every, str, PEFT), "sd3")["diffusers"] == len(every)


@pytest.mark.parametrize("alpha", [True, False])
def test_sd3_in_its_authors_names(alpha: bool) -> None:
    """A1111 fails on alphas in kohya's manner, kohya without them."""
    names = {"lora_unet_" + joint(layer).replace(".", "_") for layer in layers(sd3()) if layer.startswith("tr")}
    assert len(names) == 245
    keys = [name + ending for name in names for ending in (KOHYA if alpha else KOHYA[:2])]
    assert loaded(keys, "sd3") == by(0 if alpha else 245, 245, 245, 245 if alpha else 0, 0)
    told = {v.program: v.caution for v in programs.verdicts(keys, family="sd3")}
    assert ("with alphas" in told["A1111"]) == alpha and ("without alphas" in told["kohya"]) != alpha
    dotted = {"diffusion_model." + joint(layer) for layer in layers(sd3()) if layer.startswith("tr")}
    assert loaded([name + ending for name in dotted for ending in KOHYA], "sd3") == by(0, 245, 245, 0, 0)
    none: dict[str, Tensor] = {key: torch.ones(1, 1) for key in keys}
    pipe = sd3()
    pipe.load_lora_weights(none)
    assert not carried(pipe)


def test_sd3s_text_encoders() -> None:
    keys = [f"lora_te{n}_text_model_encoder_layers_0_self_attn_q_proj{e}" for n in (1, 2) for e in KOHYA]
    keys += [f"lora_te3_encoder_block_0_layer_0_SelfAttention_q{e}" for e in KOHYA]
    keys += [f"lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0{e}" for e in KOHYA]
    assert loaded(keys, "sd3") == by(0, 4, 4, 4, 0)


def test_every_family_has_a_verdict_of_every_program() -> None:
    for family in programs.FAMILIES:
        found = programs.verdicts(["lora_unet_nothing.alpha"], family=family)
        assert [verdict.program for verdict in found] == [program.name for program in programs.PROGRAMS]
