"""Every family with a UNet against diffusers' own pipeline on the same random weights: text, denoiser, VAE, whole
pictures. (SD 3: test_sd3.)"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from impasto.core.errors import UserError
from impasto.families.base import Base, Geometry, TextStates
from impasto.families.load import load_base
from impasto.families.pictures import check_refiner
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import sample
from impasto.families.save import save_folder
from impasto.families.schedulers import make_scheduler
from impasto.toolbox.convert import convert
from tests.checkpoints import write_checkpoint

CAPTIONS = ["a photo of sks dog", "", "猫 and 🐱, (literally)"]

#: family -> its pipeline in diffusers
PIPELINES: dict[str, Any] = {
    "sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline,
    "sdxl-refiner": StableDiffusionXLImg2ImgPipeline,
}
SIZE = (48, 64)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@functools.cache
def place() -> Path:
    return Path(tempfile.mkdtemp(prefix="families-"))


@functools.cache
def folder(family: str) -> Path:
    return write_checkpoint(place() / family, family, layout="diffusers")


@functools.cache
def single(family: str) -> Path:
    return write_checkpoint(place() / f"{family}.safetensors", family, layout="ldm")


@functools.cache
def base_of(family: str) -> Base:
    return load_base(folder(family))


@functools.cache
def pipeline_of(family: str) -> Any:
    return opened(family, folder(family))


def opened(family: str, path: Path) -> Any:
    pipe = PIPELINES[family].from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture(params=list(PIPELINES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str) -> Base:
    return base_of(family)


@pytest.fixture
def pipe(family: str) -> Any:
    return pipeline_of(family)


def told(pipe: Any, captions: list[str]) -> TextStates:
    """What a pipeline's own text encoders say."""
    found = pipe.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"states": found[0]} | ({"pooled": found[2]} if len(found) > 2 else {})


@torch.no_grad()
def test_text_as_diffusers(base: Base, pipe: Any) -> None:
    ours, theirs = base.encode_text(CAPTIONS), told(pipe, CAPTIONS)
    assert ours.keys() == theirs.keys()
    for name, state in theirs.items():
        close(ours[name], state)


@torch.no_grad()
def test_prediction_as_diffusers(family: str, base: Base, pipe: Any) -> None:
    text = told(pipe, CAPTIONS[:2])
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3, 990])
    geometry = Geometry(torch.tensor([[640, 480], [512, 512]]), torch.tensor([[0, 16], [8, 0]]),
                        torch.tensor([[512, 384], [64, 64]]))
    added = {}
    if "pooled" in text:
        sixth = torch.full((2, 1), 6.0) if family == "sdxl-refiner" else geometry.target
        ids = torch.cat([geometry.original, geometry.crop, sixth], dim=1).float()
        added = {"added_cond_kwargs": {"text_embeds": text["pooled"], "time_ids": ids}}
    theirs = pipe.unet(x, time, text["states"], **added).sample
    close(base.predict(x, time, base.condition(text, geometry)), theirs)


@torch.no_grad()
def test_vae_as_diffusers(base: Base, pipe: Any) -> None:
    pixels, noise = torch.rand(2, 3, *SIZE) * 2 - 1, torch.randn(2, base.latent_channels, SIZE[0] // 8, SIZE[1] // 8)
    given = pipe.vae.encode(pixels).latent_dist
    close(base.encode_images(pixels), given.parameters)
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor or 0
    latents = (given.mean + given.std * noise - shift) * scale
    close(base.latents(base.encode_images(pixels), noise), latents)
    close(base.decode_latents(latents), pipe.vae.decode(latents / scale + shift).sample)


@pytest.mark.parametrize("negative", ["", "a cat"])
def test_pictures_as_diffusers(family: str, base: Base, pipe: Any, negative: str) -> None:
    begin = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8).astype(np.uint8))
    img2img = "Img2Img" in type(pipe).__name__
    settings = SampleSettings(steps=4, guidance=5.0, scheduler="ddim", width=SIZE[1], height=SIZE[0], strength=0.6)
    ours = sample(base, ["a dog"], [negative], [3], settings, init_images=[begin] if img2img else None)[0]
    given: dict[str, Any] = {"image": begin, "strength": 0.6} if img2img else {"width": SIZE[1], "height": SIZE[0]}
    theirs = pipe("a dog", negative_prompt=negative or None, num_inference_steps=4, guidance_scale=5.0,
                  generator=torch.Generator("cpu").manual_seed(3), output_type="np", **given).images[0]
    assert np.abs(np.asarray(ours) / 255 - theirs).max() < 1.01 / 255


def test_file_and_folder_are_one_base(family: str, base: Base, tmp_path: Path) -> None:
    """In both layouts, converted in both directions, and as a training leaves it."""
    assert load_base(single(family)).fingerprint() == base.fingerprint()
    convert(folder(family), tmp_path / "single.safetensors")
    convert(single(family), tmp_path / "folder")
    save_folder(base, tmp_path / "saved", dtype=torch.float32)
    for path in ("single.safetensors", "folder", "saved"):
        again = load_base(tmp_path / path)
        assert again.fingerprint() == base.fingerprint() and not again.surplus
        assert (again.process, again.native_size) == (base.process, base.native_size)


@torch.no_grad()
@pytest.mark.parametrize("how", ["converted", "saved"])
def test_diffusers_opens_the_folders(family: str, base: Base, pipe: Any, tmp_path: Path, how: str) -> None:
    if how == "saved":
        save_folder(base, tmp_path / "folder", dtype=torch.float32)
    else:
        convert(single(family), tmp_path / "folder")
    again = opened(family, tmp_path / "folder")
    for name, state in told(again, CAPTIONS).items():
        close(state, told(pipe, CAPTIONS)[name])
    assert again.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    for name, value in pipe.config.items():
        assert name.startswith("_") or again.config[name] == value


@torch.no_grad()
def test_long_captions_are_chunks_side_by_side(base: Base) -> None:
    """A picture does not depend on the length of its neighbours' captions."""
    one, two = base.encode_text(["a cat"]), base.encode_text(["a dog and a cat, " * 20])
    x, time = torch.randn(1, base.latent_channels, 8, 8), torch.tensor([500])
    together = base.predict(x.expand(2, -1, -1, -1), time.expand(2), base.condition(base.stack_text([one, two])))
    for i, text in enumerate((one, two)):
        close(together[i:i + 1], base.predict(x, time, base.condition(text)))


# --- a refiner -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++2m"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_base_and_its_refiner_as_diffusers(scheduler: str, share: float) -> None:
    """`denoising_end` and `denoising_start`, which pass latents on."""
    settings = SampleSettings(steps=6, guidance=5.0, scheduler=scheduler, width=SIZE[1], height=SIZE[0], handover=share)
    base, refiner = base_of("sdxl"), base_of("sdxl-refiner")
    told: list[tuple[int, int]] = []
    ours = sample(base, ["a dog"], ["a cat"], [3], settings, refiner=refiner,
                  on_step=lambda done, steps: told.append((done, steps)))[0]
    assert told == [(done, 6) for done in range(1, 7)]
    common: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": "a cat"}
    pipes = [opened(family, folder(family)) for family in ("sdxl", "sdxl-refiner")]
    for pipe, own in zip(pipes, (base, refiner), strict=True):
        pipe.scheduler = make_scheduler(scheduler, own.process, own.scheduler)
    latents = pipes[0]("a dog", width=SIZE[1], height=SIZE[0], generator=torch.Generator("cpu").manual_seed(3),
                       denoising_end=share, output_type="latent", **common).images
    theirs = pipes[1]("a dog", image=latents, denoising_start=share, output_type="np", original_size=SIZE,
                      generator=torch.Generator("cpu").manual_seed(4), **common).images[0]
    assert np.abs(np.asarray(ours) / 255 - theirs).max() < 1.01 / 255
    alone = sample(base, ["a dog"], ["a cat"], [3], settings)[0]
    assert np.abs(np.asarray(alone, dtype=float) - np.asarray(ours)).max() > 2


def test_who_can_refine_whom() -> None:
    base, refiner, other = base_of("sdxl"), base_of("sdxl-refiner"), base_of("sd1")
    check_refiner(base, refiner, picture=False)
    check_refiner(base, base, picture=False)
    check_refiner(refiner, None, picture=True)
    with pytest.raises(UserError, match="is a refiner: it finishes pictures.*give it as --refiner beside a base"):
        check_refiner(refiner, None, picture=False)
    with pytest.raises(UserError, match="goes on from other latents than sd1 makes"):
        check_refiner(other, refiner, picture=False)
