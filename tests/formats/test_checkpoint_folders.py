"""diffusers folders as they are found: old names, shards, variants, missing files, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.formats.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.formats.checkpoint_cases import COMPONENTS, equal, one_line, tensors_of


def test_old_names_in_the_vae(copied: Path, own) -> None:
    """As diffusers before 0.15 wrote them, and as 1×1 convolutions."""
    file = copied / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for key in [key for key in tensors if ".attentions.0." in key]:
        for new, word in old.items():
            if f".{new}." in key:
                tensor = tensors.pop(key)
                tensors[key.replace(f".{new}.", f".{word}.")] = tensor[..., None, None] if tensor.ndim == 2 else tensor
    assert sum(".query." in key for key in tensors) == 4
    save_file(tensors, file)
    assert equal(tensors_of(open_checkpoint(copied)), own)


def test_text_model_in_a_folder(copied: Path, own) -> None:
    """Both spellings: transformers before 5.6 wrote `text_model.`, and `position_ids` beside."""
    file = copied / "text_encoder/model.safetensors"
    tensors = load_file(file)
    long = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in tensors.items()}
    save_file(long | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    found = open_checkpoint(copied)
    assert equal(tensors_of(found), own) and found.surplus == []
    save_file({key.removeprefix("text_model."): value for key, value in long.items()}, file)
    assert equal(tensors_of(open_checkpoint(copied)), own)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards(copied: Path, own, variant) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(copied, safety_checker=None)
    for name in COMPONENTS:
        shutil.rmtree(copied / name)
        getattr(pipeline, name).save_pretrained(copied / name, max_shard_size="200KB", variant=variant or None)
        assert len(list((copied / name).glob("*.safetensors"))) > 1
    found = open_checkpoint(copied)
    assert equal(tensors_of(found), own)
    assert len(found.files("unet")) == len(list((copied / "unet").glob("*.safetensors")))
    victim = sorted((copied / "unet").glob("*.safetensors"))[0]
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim.name}: no such file"):
        open_checkpoint(copied)


def test_variants_of_files(copied: Path, own) -> None:
    for name in COMPONENTS:
        file = next((copied / name).glob("*.safetensors"))
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert equal(tensors_of(open_checkpoint(copied)), own)


def test_bin_files_are_read_by_the_rule_of_pickles(copied: Path, own) -> None:
    for name in COMPONENTS:
        file = next((copied / name).glob("*.safetensors"))
        stem = "pytorch_model" if name == "text_encoder" else "diffusion_pytorch_model"
        torch.save(load_file(file), copied / name / f"{stem}.bin")
        file.unlink()
    assert equal(tensors_of(open_checkpoint(copied)), own)
    (copied / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.")
    with pytest.raises(UserError, match="diffusion_pytorch_model.bin"):
        open_checkpoint(copied)


def test_surplus_in_a_folder(copied: Path) -> None:
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"extra.weight": torch.zeros(2)}, file)
    assert open_checkpoint(copied).surplus == ["unet.extra.weight"]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("file", "changes", "says"), [
    ("model_index.json", {"_class_name": "FluxPipeline"}, "is a Flux checkpoint, which is not supported"),
    ("model_index.json", {"_class_name": "MusicPipeline"}, "is a folder of MusicPipeline"),
    ("model_index.json", {"unet": ["diffusers", "Unet3D"]}, "has a Unet3D as its unet"),
    ("unet/config.json", {"block_out_channels": [32, 96]}, "where (96"),
    ("unet/config.json", {"layers_per_block": 2}, "tensors of its unet"),
    ("unet/config.json", {"layers_per_block": 10_000}, "too many tensors"),
    ("unet/config.json", {"block_out_channels": None}, "describes no network"),
    ("unet/config.json", {"block_out_channels": ["a", "b"]}, "describes no network"),
    ("unet/config.json", {"in_channels": [4]}, "describes no network (conv_in.weight would be"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256, which is not supported"),
    ("vae/config.json", {"latent_channels": "4"}, "describes no network"),
])
def test_folders_that_do_not_fit(copied: Path, file, changes, says) -> None:
    edit(copied / file, **changes)
    with pytest.raises(UserError) as caught:
        open_checkpoint(copied)
    assert says in str(caught.value) and str(copied) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_with_files_missing(copied: Path) -> None:
    (copied / "unet/diffusion_pytorch_model.safetensors").rename(copied / "unet/diffusion_flax_model.msgpack")
    with pytest.raises(UserError, match=r"has no weights that can be read; there is diffusion_flax_model.msgpack"):
        open_checkpoint(copied)
    (copied / "unet/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: is not JSON"):
        open_checkpoint(copied)
    (copied / "unet/config.json").unlink()
    with pytest.raises(UserError, match="no such file"):
        open_checkpoint(copied)
    (copied / "model_index.json").unlink()
    assert "without model_index.json" in one_line(copied)


def test_an_index_that_leads_out_of_its_folder(copied: Path) -> None:
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    for name in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "a\\b", "C:x"):
        file.unlink(missing_ok=True)
        (copied / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(UserError, match="outside its folder"):
            open_checkpoint(copied)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [("a.safetensors", "ldm"), ("a", "diffusers")])
def test_the_real_size(tmp_path: Path, request: pytest.FixtureRequest, name, layout) -> None:
    """2 GB in float16: read through without taking that much memory."""
    import psutil

    path = write_checkpoint(tmp_path / name, size="real", layout=layout, dtype=torch.float16)
    request.addfinalizer(lambda: shutil.rmtree(tmp_path))  # pytest would keep it
    memory = psutil.Process().memory_full_info().uss
    found = open_checkpoint(path)
    assert sum(tensor.numel() for part in COMPONENTS for _, tensor in found.tensors(part)) == 1_066_235_307
    assert all(torch.isfinite(tensor).all() for part in COMPONENTS for _, tensor in found.tensors(part))
    assert psutil.Process().memory_full_info().uss - memory < 5e8  # of 2.1e9
