"""Loading: every layout gives the same base; what is wrong is told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.families.load import load_base, locate
from impasto.families.sd1 import SD1
from impasto.formats.header import read_header
from tests.checkpoints import write_checkpoint
from tests.heard import Heard


def same(one: Any, other: Any, components: tuple[str, ...] = ("unet", "text_encoder", "vae")) -> bool:
    return all(torch.equal(a, b) for name in components
               for a, b in zip(one.components[name].state_dict().values(), other.components[name].state_dict().values(),
                               strict=True))


def test_file_and_folder_are_one_base(base: SD1, file: Path) -> None:
    other = load_base(file)
    assert same(base, other) and other.source == file and base.family == other.family == "sd1"
    assert base.process.scheduler_config() == other.process.scheduler_config()
    caption = ["a photo of sks dog"]
    assert torch.equal(base.encode_text(caption)["states"], other.encode_text(caption)["states"])


def test_family(file: Path) -> None:
    assert load_base(file, family="sd1").family == "sd1"
    with pytest.raises(UserError, match="unknown family 'sd11'; did you mean 'sd1'"):
        load_base(file, family="sd11")


def test_precision_and_clip_skip(file: Path) -> None:
    half = load_base(file, dtype=torch.bfloat16, clip_skip=1)
    dtypes = {name: next(m.parameters()).dtype for name, m in half.components.items()}
    assert dtypes == {"unet": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float32}
    assert half.text_settings() == {"clip_skip": 1}
    with pytest.raises(UserError, match="clip_skip 2 leaves none"):
        load_base(file, clip_skip=2)


def test_another_vae(base: SD1, file: Path, folder: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", family="sd1", size="mini", layout="diffusers", seed=9)
    mixed = load_base(file, vae=other / "vae")
    assert same(mixed, load_base(other), ("vae",)) and same(mixed, base, ("unet", "text_encoder"))
    whole = load_base(file, vae=other)  # a whole checkpoint has one too
    assert same(whole, mixed)
    assert mixed.fingerprint() == base.fingerprint() | {"vae": load_base(other).fingerprint()["vae"]}
    with pytest.raises(UserError, match="no such file"):
        load_base(file, vae=tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="is a VAE alone, not a base"):
        load_base(other / "vae")


def test_a_vae_of_other_latents(file: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "xl", family="sdxl", layout="diffusers")
    for vae in (other, other / "vae"):
        with pytest.raises(UserError, match="is a VAE of sdxl and sdxl-refiner, whose latents are others than those"):
            load_base(file, vae=vae)
    load_base(file, vae=write_checkpoint(tmp_path / "2.safetensors", family="sd2"))  # the same latents


def test_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    """A folder's own vocabulary is used: here two ids have changed places."""
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    vocabulary = json.loads((own / "tokenizer/vocab.json").read_text())
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    (own / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    plain, swapped = load_base(folder), load_base(own)
    assert torch.equal(plain.encode_text(["cat"])["states"], swapped.encode_text(["dog"])["states"])


def test_surplus_is_noted_and_kept(file: Path, tmp_path: Path) -> None:
    tensors = load_file(file) | {"merged.by.somebody": torch.zeros(2)}
    with_more = tmp_path / "more.safetensors"
    save_file(tensors, with_more, read_header(file).metadata)
    heard = Heard()
    assert load_base(with_more, report=heard).surplus == ["merged.by.somebody"]
    assert heard.notes == ["1 surplus tensor in more.safetensors, kept but not used: merged.by.somebody"]


def test_parts_that_are_missing(file: Path, tmp_path: Path) -> None:
    metadata = read_header(file).metadata
    without_vae = tmp_path / "without_vae.safetensors"
    rest = {key: tensor for key, tensor in load_file(file).items() if not key.startswith("first_stage_model.")}
    save_file(rest, without_vae, metadata)
    with pytest.raises(UserError, match="holds no vae; give a VAE"):
        load_base(without_vae)
    assert same(load_base(without_vae, vae=file), load_base(file))


@pytest.mark.parametrize("path", ["absent.safetensors", "owner/absent.safetensors", "./owner/name", "a/b/c", "/absent"])
def test_no_such_path(path: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        locate(path)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nor in the hub's local cache"):
        load_base("owner/name")
    with pytest.raises(UserError, match="hub"):
        load_base("owner/name", download=True)  # the tests are offline
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0123")
    shutil.copytree(folder, snapshot)
    assert locate("owner/name") == snapshot


@pytest.mark.slow
def test_real_size(tmp_path: Path) -> None:
    """SD 1.5's own size in fp16, read without a second copy: weights and a little."""
    import psutil

    path = write_checkpoint(tmp_path / "real.safetensors", size="real", dtype=torch.float16)
    before = psutil.Process().memory_info().rss
    base = load_base(path, dtype=torch.float16)
    held = sum(p.numel() * p.element_size() for m in base.components.values() for p in m.parameters())
    assert psutil.Process().memory_info().rss - before < held + 400 * 2**20
    assert len(base.targets("attention")) == 128
    assert base.encode_text(["a photo of sks dog"])["states"].shape == (1, 77, 768)
