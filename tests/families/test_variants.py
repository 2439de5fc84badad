"""Inpainting and instruct-pix2pix bases against diffusers' own pipelines on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.rng import picture_generator
from impasto.families.guidance import Guidance
from impasto.families.load import load_base
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import sample
from impasto.families.save import save_folder
from impasto.families.schedulers import SCHEDULERS
from impasto.families.sd1 import SD1
from impasto.families.unet_base import UNetBase
from impasto.families.variants import variant_of
from tests.checkpoints import write_checkpoint
from tests.families.conftest import SCHEDULER

PROMPTS, NEGATIVES, SEEDS = ["a photo of sks dog", "a cat"], ["", "ugly"], [42, 7]
PIPELINES = {"inpainting": "StableDiffusionInpaintPipeline",
             "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {variant: write_checkpoint(root / variant, layout="diffusers", variant=variant) for variant in PIPELINES}


def opened(folder: Path, variant: str) -> Any:
    pipe = getattr(diffusers, PIPELINES[variant]).from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, Any]:
    return {variant: load_base(folder) for variant, folder in folders.items()}


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, Any]:
    return {variant: opened(folder, variant) for variant, folder in folders.items()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What our sampler decodes, before rounding to bytes."""
    seen: list[Tensor] = []
    decode = UNetBase.decode_latents

    def keep(self: UNetBase, latents: Tensor) -> Tensor:
        seen.append(decode(self, latents))
        return seen[-1]

    monkeypatch.setattr(UNetBase, "decode_latents", keep)
    return seen


def settings(**changes: Any) -> SampleSettings:
    return SampleSettings(**{"steps": 4, "guidance": 5.0, "width": 32, "height": 24, "scheduler": "ddim",
                             "strength": 1.0, **changes})


def pictures() -> list[Image.Image]:
    arrays = np.random.default_rng(0).integers(0, 255, (2, 24, 32, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in arrays]


def masks() -> list[Image.Image]:
    """Blobs of grey, whose edges lie anywhere in latent cells."""
    small = np.random.default_rng(1).integers(0, 255, (2, 5, 7), dtype=np.uint8)
    return [Image.fromarray(array).resize((32, 24), Image.Resampling.BICUBIC) for array in small]


def set_scheduler(pipe: Any, name: str) -> None:
    kind, options = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(SCHEDULER, **options)


def compare(decoded: list[Tensor], theirs: Tensor) -> None:
    """Within 1e-4 in pixels of [0, 1]."""
    ours = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def generators() -> list[torch.Generator]:
    return [picture_generator(seed) for seed in SEEDS]


def test_after_a_base_for_inpainting_a_refiner_keeps_to_the_mask(bases: dict[str, Any], base: SD1) -> None:
    own, nothing = pictures()[:1], [Image.new("L", (32, 24), 0)]
    alone, refined, *others = ([np.asarray(one) for one in sample(
        bases["inpainting"], [prompt], [""], [3], settings(steps=6, handover=0.5), init_images=own, masks=mask,
        refiner=refiner)] for prompt, mask, refiner in (
            ("a dog", nothing, None), ("a dog", nothing, base), ("a red cat", nothing, base),
            ("a dog", masks()[:1], base), ("a red cat", masks()[:1], base)))
    assert np.array_equal(refined, others[0]) and not np.array_equal(alone, refined)
    assert not np.array_equal(others[1], others[2])  # in the hole it does go on


# --- the network -------------------------------------------------------------------------------------------


def test_channels_tell_the_variant(bases: dict[str, Any], base: SD1) -> None:
    assert [variant_of(channels, 4) for channels in (4, 8, 9, 5)] == ["", "instruct-pix2pix", "inpainting", None]
    assert [variant_of(channels, 16) for channels in (16, 32, 33)] == ["", "instruct-pix2pix", "inpainting"]
    assert {each.variant: each.extras for each in (base, *bases.values())} == {
        "": (), "inpainting": ("mask", "masked"), "instruct-pix2pix": ("picture",)}


@torch.no_grad()
@pytest.mark.parametrize("in_pixels", [False, True])
def test_an_inpainting_unet_is_called_as_diffusers_does(bases: dict[str, Any], pipes: dict[str, Any],
                                                        in_pixels: bool) -> None:
    base, unet = bases["inpainting"], pipes["inpainting"].unet
    x, masked, time = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 990])
    mask = (torch.rand(2, 1, 64, 64) < 0.5).float()
    small = mask[:, :, ::8, ::8]
    text = base.encode_text(PROMPTS)
    ours = base.predict(x, time, base.condition(text, extras={"mask": mask if in_pixels else small, "masked": masked}))
    theirs = unet(torch.cat([x, small, masked], 1), time, text["states"]).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_editing_unet_is_called_as_diffusers_does(bases: dict[str, Any], pipes: dict[str, Any]) -> None:
    base, pipe = bases["instruct-pix2pix"], pipes["instruct-pix2pix"]
    x, time, pixels = torch.randn(2, 4, 8, 8), torch.tensor([3, 990]), torch.rand(2, 3, 64, 64) * 2 - 1
    text = base.encode_text(PROMPTS)
    extras = base.seen({"picture": base.encode_images(pixels)}, lambda use, shape: pytest.fail("it is no sample"))
    latents = pipe.prepare_image_latents(pixels, 2, 1, torch.float32, "cpu", False)  # not scaled, as it happens
    ours = base.predict(x, time, base.condition(text, extras=extras))
    theirs = pipe.unet(torch.cat([x, latents], 1), time, text["states"]).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- whole pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpm++2m", "heun"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainted_as_by_diffusers(bases: dict[str, Any], pipes: dict[str, Any], decoded: list[Tensor], name: str,
                                   strength: float) -> None:
    pipe = pipes["inpainting"]
    set_scheduler(pipe, name)
    theirs = pipe(PROMPTS, image=pictures(), mask_image=masks(), negative_prompt=NEGATIVES, strength=strength,
                  num_inference_steps=4, guidance_scale=5.0, width=32, height=24, generator=generators(),
                  output_type="pt").images
    sample(bases["inpainting"], PROMPTS, NEGATIVES, SEEDS, settings(scheduler=name, strength=strength),
           init_images=pictures(), masks=masks())
    compare(decoded, theirs)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpm++2m", "heun"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_plain_base_inpaints_as_in_diffusers(base: SD1, pipeline: Any, decoded: list[Tensor], name: str,
                                               strength: float) -> None:
    pipe = diffusers.StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, name)
    theirs = pipe(PROMPTS, image=pictures(), mask_image=masks(), negative_prompt=NEGATIVES, strength=strength,
                  num_inference_steps=4, guidance_scale=5.0, width=32, height=24, generator=generators(),
                  output_type="pt").images
    sample(base, PROMPTS, NEGATIVES, SEEDS, settings(scheduler=name, strength=strength), init_images=pictures(),
           masks=masks())
    compare(decoded, theirs)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpm++2m", "heun"])
@pytest.mark.parametrize(("guidance", "by_picture"), [(5.0, 1.5), (7.5, 1.0), (1.0, 1.0)])
def test_edited_as_by_diffusers(bases: dict[str, Any], pipes: dict[str, Any], decoded: list[Tensor], name: str,
                                guidance: float, by_picture: float) -> None:
    pipe = pipes["instruct-pix2pix"]
    set_scheduler(pipe, name)
    theirs = pipe(PROMPTS, image=pictures(), negative_prompt=NEGATIVES, num_inference_steps=4, guidance_scale=guidance,
                  image_guidance_scale=by_picture, generator=generators(), output_type="pt").images
    sample(bases["instruct-pix2pix"], PROMPTS, NEGATIVES, SEEDS,
           settings(scheduler=name, guidance=guidance, image_guidance=by_picture, strength=0.5), init_images=pictures())
    compare(decoded, theirs)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("variant", PIPELINES)
def test_other_families_have_them_too(tmp_path: Path, decoded: list[Tensor], family: str, variant: str) -> None:
    folder = write_checkpoint(tmp_path / "base", family=family, layout="diffusers", variant=variant)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    edits, negatives = variant != "inpainting", ["blurry", "ugly"]
    shown: dict[str, Any] = {"image_guidance_scale": 2.0} if edits else {"mask_image": masks(), "strength": 1.0}
    if family == "sdxl" or not edits:
        shown |= {"width": 32, "height": 24}
    theirs = pipe(prompt=PROMPTS, image=pictures(), negative_prompt=negatives, num_inference_steps=3,
                  guidance_scale=5.0, generator=generators(), output_type="pt", **shown).images
    sample(load_base(folder), PROMPTS, negatives, SEEDS, settings(steps=3, image_guidance=2.0), init_images=pictures(),
           masks=None if edits else masks())
    compare(decoded, theirs)


def test_guidance_of_three_is_equation_three() -> None:
    """With w = 1 for both it is the whole condition's; each weight is linear in its own difference."""
    both, picture, neither = torch.randn(3, 2, 4, 3, 3)
    said = torch.cat([neither, picture, both])
    torch.testing.assert_close(Guidance(1.0, 1.0 + 1e-9).joined(said), both, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Guidance(1.0, 3.0).joined(said) - Guidance(1.0, 2.0).joined(said), picture - neither,
                               rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Guidance(4.0, 2.0).joined(said) - Guidance(3.0, 2.0).joined(said), both - picture,
                               rtol=1e-4, atol=1e-5)
    assert (Guidance(7.5, 1.5).ways, Guidance(1.0, 1.0).ways, Guidance(7.5).ways, Guidance(0.0).ways) == (3, 1, 2, 1)


# --- what does not fit -------------------------------------------------------------------------------------


def test_what_is_missing_or_has_no_place_is_one_line(bases: dict[str, Any], base: SD1) -> None:
    def refused(base: Any, line: str, **shown: Any) -> None:
        with pytest.raises(UserError, match=line) as raised:
            sample(base, ["a"], [""], [1], settings(), **shown)
        assert "\n" not in str(raised.value)

    one, hole = pictures()[:1], masks()[:1]
    refused(bases["inpainting"], "an inpainting base is to be shown a picture and a mask")
    refused(bases["inpainting"], "an inpainting base is to be shown a picture and a mask", init_images=one)
    refused(bases["instruct-pix2pix"], "an instruct-pix2pix base is to be shown a picture to edit")
    refused(bases["instruct-pix2pix"], "an instruct-pix2pix base has no place for mask", init_images=one, masks=hole)
    refused(base, "a mask is of a picture, and there is none", masks=hole)
    refused(bases["inpainting"], "the mask is 8x8 pixels, not 32x24", init_images=one, masks=[Image.new("L", (8, 8))])
    with pytest.raises(UserError, match="a plain base has no place for mask and masked"):
        base.condition(base.encode_text(["a"]), extras={"mask": torch.ones(1, 1, 8, 8),
                                                        "masked": torch.ones(1, 4, 8, 8)})


@pytest.mark.parametrize("variant", PIPELINES)
def test_a_saved_folder_opens_in_its_pipeline(bases: dict[str, Any], tmp_path: Path, variant: str) -> None:
    save_folder(bases[variant], tmp_path / "saved", dtype=torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None, local_files_only=True)
    assert type(pipe).__name__ == PIPELINES[variant] and pipe.unet.config.in_channels in (8, 9)
    again = load_base(tmp_path / "saved")
    assert again.variant == variant and again.fingerprint() == bases[variant].fingerprint()


@pytest.mark.parametrize("variant", PIPELINES)
def test_a_single_file_is_of_the_same_variant(tmp_path: Path, variant: str, bases: dict[str, Any]) -> None:
    file = write_checkpoint(tmp_path / "one.safetensors", variant=variant)
    assert load_base(file).variant == variant and load_base(file).fingerprint() == bases[variant].fingerprint()
