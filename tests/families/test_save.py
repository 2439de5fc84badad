"""A base that is saved as a folder is the same base to diffusers and to us."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError

from impasto.core import files
from impasto.core.errors import UserError
from impasto.families.load import load_base
from impasto.families.save import save_folder
from impasto.families.sd1 import SD1
from impasto.formats import written

CAPTION = "a photo of a dog"


def test_we_read_the_same_weights_back(base: SD1, tmp_path: Path) -> None:
    save_folder(base, tmp_path / "saved", dtype=torch.float32)
    assert load_base(tmp_path / "saved").fingerprint() == base.fingerprint()


def test_an_ldm_file_becomes_the_folder_of_the_same_weights(file: Path, base: SD1, tmp_path: Path) -> None:
    save_folder(load_base(file), tmp_path / "saved", dtype=torch.float32)
    assert load_base(tmp_path / "saved").fingerprint() == base.fingerprint()


def test_diffusers_opens_it_and_computes_the_same(base: SD1, tmp_path: Path) -> None:
    save_folder(base, tmp_path / "saved", dtype=torch.float32, metadata={"impasto.step": "3"})
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    states = pipe.encode_prompt(CAPTION, "cpu", 1, False)[0]
    torch.testing.assert_close(states, base.encode_text([CAPTION])["states"], rtol=1e-4, atol=1e-5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([7])
    theirs = pipe.unet(latents, time, states).sample
    torch.testing.assert_close(theirs, base.predict(latents, time, base.condition({"states": states})), rtol=1e-4,
                               atol=1e-5)
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(pixels, base.decode_latents(latents), rtol=1e-4, atol=1e-5)
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"


def test_half_precision_is_rounded_weights(base: SD1, tmp_path: Path) -> None:
    save_folder(base, tmp_path / "saved", dtype=torch.float16)
    again = load_base(tmp_path / "saved")
    for (name, ours), theirs in zip(base.denoiser.named_parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(ours.half().float(), theirs), name


def test_a_full_disk_leaves_nothing(base: SD1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "rename", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_folder(base, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_what_reads_back_otherwise_is_not_saved(base: SD1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = written.save_file

    def failing(tensors: Any, path: Path, metadata: Any) -> None:
        plain(tensors, path, metadata)
        if path.parent.name == "vae":
            data = bytearray(path.read_bytes())
            data[-3] ^= 1  # one bit of one weight
            path.write_bytes(bytes(data))

    monkeypatch.setattr(written, "save_file", failing)
    with pytest.raises(UserError, match="its vae was written and reads back as something else.*disk is failing"):
        save_folder(base, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save_folder(base, tmp_path / "out")
    assert load_base(tmp_path / "out").family == "sd1"


def test_a_full_disk_while_weights_are_written_leaves_what_was_there(base: SD1, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors tells of a full disk in words of its own."""
    save_folder(base, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(written, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_folder(base, tmp_path / "out", replace=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
