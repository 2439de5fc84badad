"""ComfyUI's, OneTrainer's and SimpleTuner's names of SD 3's layers, and other families' that are called alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.formats import mmdit_layers
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.detect import detect
from tests.formats.sd3_cases import K, Q, V, keys, pair, sd3_adapter


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
