"""A base that is saved as a folder is the same base to diffusers and to us."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from impasto.core import files
from impasto.core.errors import UserError
from impasto.families.load import load_base
from impasto.families.save import save_folder
from impasto.families.sd1 import SD1

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
