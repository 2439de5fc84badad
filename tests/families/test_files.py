"""Files as people have them: eight bits, types side by side, parts of a download; of every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.families import FAMILIES
from impasto.families.load import load_base
from impasto.formats.header import read_header
from tests.checkpoints import write_checkpoint


@pytest.fixture(params=list(FAMILIES), scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def single(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(family) / "base.safetensors", family, layout="ldm")


def written(path: Path, single: Path, kind) -> Path:
    """The file with each tensor in the type that `kind` says of its key."""
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    save_file({key: tensor.to(kind(key)) if tensor.is_floating_point() else tensor
               for key, tensor in load_file(single).items()}, path, metadata)
    return path


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_read(single: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    """As they are rounded in the file; matrices alone, as published files have it, the rest in half precision."""
    header = read_header(single).tensors
    file = written(tmp_path / "fp8.safetensors", single,
                   lambda key: dtype if len(header[key].shape) > 1 else torch.float16)
    base, whole = load_base(file), load_base(single)
    for component, network in base.components.items():
        for (name, ours), theirs in zip(network.named_parameters(), whole.components[component].parameters(),
                                        strict=True):
            rounded = theirs.to(dtype if ours.ndim > 1 else torch.float16).float()
            assert ours.dtype == torch.float32 and torch.equal(ours, rounded), f"{component}.{name}"
    states = base.encode_text(["a cat"])
    assert all(torch.isfinite(state).all() for state in states.values())


def test_scaled_eight_bits_are_refused(single: Path, tmp_path: Path) -> None:
    """Read without its scale, such a weight would be another one."""
    tensors = load_file(single)
    key = next(key for key in tensors if key.endswith(".weight") and tensors[key].ndim == 2)
    tensors[key.replace(".weight", ".scale_weight")] = torch.ones(1)
    save_file(tensors, tmp_path / "scaled.safetensors")
    assert "eight bits with scales beside them" in refused(tmp_path / "scaled.safetensors")


def test_types_side_by_side(single: Path, tmp_path: Path) -> None:
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    file = written(tmp_path / "mixed.safetensors", single, lambda key: kinds[sum(key.encode()) % 4])
    base = load_base(file, dtype=torch.bfloat16)
    assert {p.dtype for p in base.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.components["vae"].parameters()} == {torch.float32}
    text = base.encode_text(["a cat"])
    x = torch.randn(1, base.latent_channels, 8, 8)
    time = torch.tensor([0.5]) if base.process.prediction == "flow" else torch.tensor([500])
    assert torch.isfinite(base.predict(x, time, base.condition(text))).all()


def shards(folder: Path, component: str) -> Path:
    """Cut a component's weights into two shards, with their index."""
    (whole,) = (folder / component).glob("*.safetensors")
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"{whole.stem}-{number + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / component / file)
        weight_map |= dict.fromkeys(part, file)
    whole.unlink()
    index = folder / component / f"{whole.name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_parts_of_a_download(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", family, layout="diffusers")
    before = load_base(folder).fingerprint()
    denoiser = FAMILIES.get(family).denoiser_name
    index = shards(folder, denoiser)
    assert load_base(folder).fingerprint() == before
    second = index.parent / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:len(whole) // 2])
    assert "00002-of-00002" in refused(folder)
    second.unlink()
    assert "00002-of-00002" in refused(folder) and "no such file" in refused(folder)
    (folder / denoiser / index.name).write_text('{"weight_map": {"conv_in.weight": "../../secret.safetensors"}}')
    assert "outside its folder" in refused(folder)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_base(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)
