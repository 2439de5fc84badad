"""Checkpoints in every layout: the same tensors under the same names, and one clear line for what is not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from impasto.formats import tensor_files
from impasto.formats.checkpoint import open_checkpoint
from tests.checkpoints import component_configs, spelled, write_checkpoint
from tests.formats.checkpoint_cases import COMPONENTS, TEXT, UNET, VAE, equal, one_line, tensors_of

# --- the same weights, whatever the layout --------------------------------------------------------------


def test_a_single_file(single: Path, own) -> None:
    found = open_checkpoint(single)
    assert (found.family, found.layout, found.components) == ("sd1", "ldm", COMPONENTS)
    assert found.surplus == [] and found.tokenizers == {} and found.variant == ""
    assert found.scheduler["prediction_type"] == "epsilon"
    assert equal(tensors_of(found), own)
    configs = component_configs()
    assert {name: {**found.configs[name], **configs[name]} for name in COMPONENTS} == configs
    assert found.files("unet") == [single]


def test_a_folder(folder: Path, own) -> None:
    found = open_checkpoint(folder)
    assert (found.family, found.layout, found.components) == ("sd1", "diffusers", COMPONENTS)
    assert found.surplus == [] and found.tokenizers == {"tokenizer": folder / "tokenizer"}
    assert found.scheduler["_class_name"] == "PNDMScheduler"
    assert equal(tensors_of(found), own)
    assert found.files("vae") == [folder / "vae/diffusion_pytorch_model.safetensors"]


def test_diffusers_reads_the_folder_as_we_do(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    found = open_checkpoint(folder)
    for name in COMPONENTS:
        network = getattr(pipeline, name)
        assert isinstance(network, nn.Module)
        assert equal(dict(found.tensors(name)), spelled(network))
        for key, value in found.configs[name].items():
            kept = getattr(network.config, key)
            assert key.startswith("_") or key in ("dtype", "architectures") or value == (
                list(kept) if isinstance(kept, tuple) else kept), key
    assert pipeline.tokenizer("a photo of sks dog").input_ids == [49406, 320, 1125, 539, 48136, 1929, 49407]
    with torch.no_grad():
        picture = pipeline("a dog", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert torch.isfinite(picture).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "layout"), [("a.safetensors", "ldm"), ("a.ckpt", "ldm"), ("a", "diffusers")])
def test_half_precision_stays(tmp_path: Path, own, name, layout, dtype) -> None:
    found = open_checkpoint(write_checkpoint(tmp_path / name, layout=layout, dtype=dtype))
    assert equal(tensors_of(found), {key: tensor.to(dtype) for key, tensor in own.items()})
    assert {kind for part in COMPONENTS for _, kind in found.names(part).values()} == {dtype}


def test_a_pickle(tmp_path: Path, own) -> None:
    found = open_checkpoint(write_checkpoint(tmp_path / "a.ckpt"))
    assert found.layout == "ldm" and found.surplus == []
    assert equal(tensors_of(found), own)


def test_names_match_tensors(single: Path, folder: Path) -> None:
    for path in (single, folder):
        found = open_checkpoint(path)
        for part in COMPONENTS:
            listed = found.names(part)
            assert {name: (tuple(t.shape), t.dtype) for name, t in found.tensors(part)} == listed


def test_opening_reads_no_tensor(single: Path, folder: Path, monkeypatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(tensor_files, "safe_open", refuse)
    for path in (single, folder):
        assert len(open_checkpoint(path).names("unet")) > 100


def test_tensors_come_one_at_a_time(single: Path) -> None:
    stream = open_checkpoint(single).tensors("text_encoder")
    name, first = next(stream)
    assert name.startswith("text_model.") and first.dtype == torch.float32
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("pad", range(4))
def test_unaligned_files(tmp_path: Path, pad) -> None:
    """The format allows them; a mapped tensor must still be one that every kernel reads."""
    text = json.dumps({"h": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
                       "a": {"dtype": "F32", "shape": [3], "data_offsets": [2, 14]}}).encode()
    path = header(tmp_path / "a.safetensors", text + b" " * pad, torch.ones(1).half().numpy().tobytes()
                  + torch.arange(3.0).numpy().tobytes())
    found = dict(tensor_files.open_tensors(path).read(["h", "a"]))
    assert found["a"].tolist() == [0, 1, 2] and found["h"].tolist() == [1]
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


# --- single files as they are found ---------------------------------------------------------------------


def test_keys_of_nobody_are_listed(changed, own) -> None:
    """What merges of model sites carry: EMA copies, schedules, a logit scale, constants."""
    extra = {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3), "alphas_cumprod": torch.zeros(1000),
             "cond_stage_model.logit_scale": torch.tensor(1.0), f"{TEXT}text_projection.weight": torch.zeros(3),
             f"{UNET}input_blocks.99.0.weight": torch.zeros(2)}
    # a block far out would be a level of its own; name it so that no level is implied
    extra[f"{UNET}lora_te"] = extra.pop(f"{UNET}input_blocks.99.0.weight")
    found = open_checkpoint(changed(lambda tensors: tensors.update(extra)))
    assert sorted(found.surplus) == sorted(extra)
    assert equal(tensors_of(found), own)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_position_ids_are_dropped(changed, own, dtype) -> None:
    ids = {f"{TEXT}embeddings.position_ids": torch.arange(77)[None].to(dtype)}
    found = open_checkpoint(changed(lambda tensors: tensors.update(ids)))
    assert found.surplus == [] and equal(tensors_of(found), own)


def test_text_encoders_without_text_model(changed, own) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(TEXT)]:
            tensors[key.replace("text_model.", "")] = tensors.pop(key)

    found = open_checkpoint(changed(shorten))
    assert equal(tensors_of(found), own) and found.surplus == []


def test_missing_tensors_are_counted_and_named(changed) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{UNET}middle_block.0")]:
            del tensors[key]

    line = one_line(changed(lose))
    assert "lacks 10 of" in line and "tensors of its unet: middle_block.0.in_layers.0.weight" in line and "…" in line


@pytest.mark.parametrize("part", [UNET, TEXT, VAE])
def test_each_single_tensor_is_missed(changed, part, single) -> None:
    keys = [key for key in load_file(single) if key.startswith(part)]
    for key in keys[:: max(1, len(keys) // 3)]:
        one_line(changed(lambda tensors, key=key: tensors.pop(key)))


def test_a_wrong_shape(changed) -> None:
    line = one_line(changed(lambda tensors: tensors.update({f"{UNET}out.0.weight": torch.zeros(31)})))
    assert f"has tensors of another shape than its unet wants: {UNET}out.0.weight is (31,), where (32,) belongs" in line


def test_without_a_vae(changed) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(VAE)]:
            del tensors[key]

    assert open_checkpoint(changed(lose)).components == ("unet", "text_encoder")


@pytest.mark.parametrize("variant", ["inpainting", "instruct-pix2pix"])
@pytest.mark.parametrize(("name", "layout"), [("a.safetensors", "ldm"), ("a", "diffusers")])
def test_variants(tmp_path: Path, variant, name, layout) -> None:
    found = open_checkpoint(write_checkpoint(tmp_path / name, layout=layout, variant=variant))
    assert (found.family, found.variant) == ("sd1", variant)
    assert found.configs["unet"]["in_channels"] == {"inpainting": 9, "instruct-pix2pix": 8}[variant]


@pytest.mark.parametrize(("metadata", "marks", "expected"), [
    ({}, [], ("epsilon", False)), ({"modelspec.prediction_type": "epsilon"}, [], ("epsilon", False)),
    ({"modelspec.prediction_type": "v"}, [], ("v_prediction", False)), ({}, ["v_pred"], ("v_prediction", False)),
    ({}, ["v_pred", "ztsnr"], ("v_prediction", True)),
])
def test_marks_of_the_noise_process(changed, metadata, marks, expected) -> None:
    found = open_checkpoint(changed(lambda t: t.update({m: torch.zeros(0) for m in marks}), metadata))
    assert (found.scheduler["prediction_type"], found.scheduler.get("rescale_betas_zero_snr", False)) == expected


def test_an_unknown_prediction_type(changed) -> None:
    assert "prediction type is 'w'" in one_line(changed(metadata={"modelspec.prediction_type": "w"}))


@pytest.mark.parametrize("told", [
    "{", "[]", '{"unet": 3}', '{"unet": {"norm_num_groups": "8"}}', '{"unet": {"in_channels": 4}}',
    '{"unet": {"attention_head_dim": 0}}', '{"unet": {"attention_head_dim": true}}', "[" * 100_000,
])
def test_bad_records_of_settings(changed, told) -> None:
    assert "impasto.config" in one_line(changed(metadata={"impasto.config": told}))


def test_channels_that_the_published_groups_do_not_divide(changed) -> None:
    """A miniature without its record: its VAE's 8 channels have no 32 groups."""
    assert "vae whose channels [8, 8, 16, 16] are no multiples of 32" in one_line(changed(drop=("impasto.config",)))


def test_settings_that_shapes_do_not_tell_are_the_published_ones(tmp_path: Path) -> None:
    from impasto.formats.configs import CONFIGS

    table = CONFIGS.get("sd1")
    unet = table.parts["unet"]
    config = component_configs()["unet"] | {"block_out_channels": [32, 64]}
    tensors = {unet.prefix + entry.ldm: torch.zeros(entry.ldm_shape) for entry in unet.entries(config)}
    save_file(tensors, tmp_path / "a.safetensors", {"impasto.family": "sd1"})
    found = open_checkpoint(tmp_path / "a.safetensors")
    assert found.components == ("unet",)
    assert (found.configs["unet"]["attention_head_dim"], found.configs["unet"]["norm_num_groups"]) == (8, 32)


# --- a VAE alone ----------------------------------------------------------------------------------------


def test_a_vae_alone(single: Path, folder: Path, tmp_path: Path, own) -> None:
    from impasto.formats.header import read_header

    vae = {key.removeprefix(VAE): tensor for key, tensor in load_file(single).items() if key.startswith(VAE)}
    metadata = read_header(single).metadata
    expected = {key: tensor for key, tensor in own.items() if key.startswith("vae.")}
    save_file(vae, tmp_path / "bare.safetensors", metadata)
    save_file({VAE + key: tensor for key, tensor in vae.items()}, tmp_path / "prefixed.safetensors", metadata)
    torch.save({"state_dict": vae, "impasto.config": metadata["impasto.config"]}, tmp_path / "vae.pt")
    for path in (tmp_path / "bare.safetensors", tmp_path / "prefixed.safetensors", tmp_path / "vae.pt",
                 folder / "vae", folder / "vae/diffusion_pytorch_model.safetensors"):
        found = open_checkpoint(path)
        assert (found.components, found.family) == (("vae",), "")
        assert equal(tensors_of(found), expected)
        assert found.configs["vae"]["norm_num_groups"] == 8


def test_a_real_vae_in_diffusers_names_needs_no_config(tmp_path: Path) -> None:
    from impasto.formats.configs import CONFIGS

    part = CONFIGS.get("sd1").parts["vae"]
    save_file({entry.name: torch.zeros(entry.shape, dtype=torch.float8_e4m3fn) for entry in part.entries(part.config)},
              tmp_path / "vae.safetensors")
    assert open_checkpoint(tmp_path / "vae.safetensors").configs["vae"] == part.config


# --- what is not ours -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "says"), [
    (["conditioner.embedders.1.model.ln_final.weight"], "lacks the tensor token_embedding.weight"),
    (["cond_stage_model.model.ln_final.weight"], "lacks the tensor token_embedding.weight"),
    (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "lacks the tensor x_embedder.proj.weight"),
    (["double_blocks.0.img_attn.qkv.weight"], "is a Flux checkpoint"),
    (["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"], "is an adapter, not a checkpoint"),
    (["emb_params"], "is an embedding, not a checkpoint"),
    (["control_model.time_embed.0.weight"], "is a controlnet, not a checkpoint"),
    (["what.ever"], "is nothing that is known here, not a checkpoint"),
    (["model.diffusion_model.input_blocks.0.0.weight"], "of a family that cannot be told"),
    (["cond_stage_model.transformer.text_model.final_layer_norm.weight"], "lacks the tensor text_model.embeddings"),
])
def test_other_files(tmp_path: Path, keys, says) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "a.safetensors")
    assert says in one_line(tmp_path / "a.safetensors")


def header(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_damaged_files(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    one_line(path)
    whole = single.read_bytes()
    for content in (b"", b"x", b"just some text in a file of another kind", whole[:5000], whole[:-1], whole + b"x",
                    b"\xff" * 16, b"\x80\x02}q\x00."):
        path.write_bytes(content)
        one_line(path)
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    assert "twice" in one_line(header(path, b"{" + entry + b"," + entry + b"}", b"0000"))
    header(path, b"{" + b" " * 100)
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    one_line(path)


def test_names_that_would_make_huge_networks(tmp_path: Path) -> None:
    """Counts in names are the file's claims: they must not cost time or memory."""
    for key in (f"{UNET}input_blocks.999.1.transformer_blocks.999.attn2.to_k.weight", f"{VAE}encoder.down.999.x",
                f"{VAE}encoder.down.0.block.999.x", f"{UNET}input_blocks.{'9' * 5000}.0.x"):
        save_file({key: torch.zeros(1, 1), f"{TEXT}x": torch.zeros(1)}, tmp_path / "a.safetensors")
        one_line(tmp_path / "a.safetensors")
