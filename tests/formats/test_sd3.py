"""SD 3's adapters in kohya's file, against diffusers' own translation, and from any format to any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
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
from tests.formats.sd3_cases import QKV, TEXT, Q, dense32, keys, sd3_adapter

FORMATS = ("kohya", "comfyui", "onetrainer", "diffusers")


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
