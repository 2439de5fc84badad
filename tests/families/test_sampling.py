"""Pictures against diffusers' own pipelines: the same weights, scheduler and seed give the same pixels."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from impasto.core.errors import UserError
from impasto.core.rng import picture_generator
from impasto.diffusion.process import DDPM, RectifiedFlow
from impasto.families.base import Base
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import given_back, sample
from impasto.families.schedulers import FLOW, SCHEDULERS, canonical, make_scheduler
from impasto.families.sd1 import SD1
from tests.families.conftest import LONG, SCHEDULER, random_sd1

PROMPTS, NEGATIVES, SEEDS = ["a photo of sks dog", "a cat"], ["", "ugly"], [42, 7]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, base: SD1) -> list[torch.Tensor]:
    """What our sampler decodes, before rounding to bytes."""
    seen: list[torch.Tensor] = []
    decode = SD1.decode_latents

    def keep(self: SD1, latents: torch.Tensor) -> torch.Tensor:
        seen.append(decode(self, latents))
        return seen[-1]

    monkeypatch.setattr(SD1, "decode_latents", keep)
    return seen


def settings(**changes: Any) -> SampleSettings:
    return SampleSettings(**{"steps": 4, "guidance": 5.0, "width": 32, "height": 24, "scheduler": "ddim", **changes})


def set_scheduler(pipe: Any, name: str) -> None:
    kind, options = SCHEDULERS.get(name, (name, {}))
    pipe.scheduler = getattr(diffusers, kind).from_config(SCHEDULER, **options)


def compare(decoded: list[torch.Tensor], theirs: torch.Tensor) -> None:
    """Within 1e-4 in pixels of [0, 1]."""
    ours = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*SCHEDULERS, "DPMSolverSinglestepScheduler"])
def test_as_diffusers(base: SD1, pipeline: Any, decoded: list[torch.Tensor], name: str) -> None:
    set_scheduler(pipeline, name)
    theirs = pipeline(PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=4, guidance_scale=5.0, width=32,
                      height=24, generator=[picture_generator(seed) for seed in SEEDS], output_type="pt").images
    pictures = sample(base, PROMPTS, NEGATIVES, SEEDS, settings(scheduler=name))
    compare(decoded, theirs)
    bytes_ = theirs[0].permute(1, 2, 0).mul(255).round().numpy()
    assert np.abs(np.asarray(pictures[0]).astype(float) - bytes_).max() <= 1


def test_seeds_are_those_of_diffusers() -> None:
    ours = torch.randn(3, generator=picture_generator(5))
    assert torch.equal(ours, torch.randn(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpm++2m", "pndm", "heun"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_img2img_as_diffusers(base: SD1, pipeline: Any, decoded: list[torch.Tensor], name: str,
                              strength: float) -> None:
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    set_scheduler(other, name)
    arrays = np.random.default_rng(0).integers(0, 255, (2, 24, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in arrays]
    theirs = other(PROMPTS, negative_prompt=NEGATIVES, image=pictures, strength=strength, num_inference_steps=4,
                   guidance_scale=5.0, generator=[picture_generator(seed) for seed in SEEDS], output_type="pt").images
    sample(base, PROMPTS, NEGATIVES, SEEDS, settings(scheduler=name, strength=strength), init_images=pictures)
    compare(decoded, theirs)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "dpm++2m_sde"])
def test_a_picture_does_not_depend_on_its_neighbours(base: SD1, decoded: list[torch.Tensor], name: str) -> None:
    """Neither by their seeds, nor by their number of chunks."""
    sample(base, ["a cat"], ["ugly"], [7], settings(scheduler=name))
    sample(base, [LONG, "a cat", "a dog"], ["", "ugly", LONG], [3, 7, 7], settings(scheduler=name))
    torch.testing.assert_close(decoded[2], decoded[0], rtol=0, atol=1e-4)
    assert (decoded[1] - decoded[0]).abs().max() > 1e-2


def test_no_guidance_is_no_negative_prompt(base: SD1, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = SD1.encode_text
    monkeypatch.setattr(SD1, "encode_text", lambda self, captions: seen.extend(captions) or encode(self, captions))
    sample(base, ["a cat"], ["ugly"], [7], settings(guidance=1.0))
    assert seen == ["a cat"]


def test_guidance_is_a_line(base: SD1, decoded: list[torch.Tensor]) -> None:
    """At one DDIM step the latents are linear in the prediction, and so in guidance (Ho and Salimans 2022, eq. 6)."""
    latents = []
    original = SD1.decode_latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SD1, "decode_latents", lambda self, x: latents.append(x) or original(self, x))
        for guidance in (2.0, 3.0, 4.0):
            sample(base, ["a cat"], ["ugly"], [7], settings(guidance=guidance, steps=1))
    torch.testing.assert_close(latents[2] - latents[1], latents[1] - latents[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "heun", "pndm"])
def test_steps_are_told_once_each(base: SD1, name: str) -> None:
    told: list[tuple[int, int]] = []
    sample(base, ["a"], [""], [1], settings(scheduler=name, steps=4), on_step=lambda i, n: told.append((i, n)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    sample(base, ["a"], [""], [1], settings(scheduler=name, steps=4, strength=0.5),
           init_images=[Image.new("RGB", (32, 24))], on_step=lambda i, n: told.append((i, n)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("name", [*FLOW, "FlowMatchEulerDiscreteScheduler"])
def test_flow_schedulers_solve_a_straight_line_exactly(name: str) -> None:
    """A flow whose velocity is the same everywhere ends where the line does."""
    process = RectifiedFlow(shift=3.0)
    scheduler = make_scheduler(name, process, {})
    scheduler.set_timesteps(8)
    x0, noise = torch.full((1, 1, 2, 2), 0.3), torch.randn(1, 1, 2, 2)
    x = noise
    for t in scheduler.timesteps:
        # what a network that knows the one picture of its world would say
        time = (t / 1000).reshape(1).float()
        prediction = (x - x0) / time.clamp(min=1e-3)
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, x0, rtol=0, atol=2e-2)


def test_zero_terminal_snr_begins_at_pure_noise() -> None:
    process = DDPM(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True,
                   prediction="v_prediction")
    for name in ("ddim", "euler"):
        scheduler = make_scheduler(name, process, SCHEDULER)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == 999 and scheduler.config["prediction_type"] == "v_prediction"
        assert scheduler.alphas_cumprod[-1] < 1e-6


def test_names_of_schedulers() -> None:
    assert canonical("DPM++2M-Karras") == canonical("dpm++2m karras") == "dpm++2m_karras"
    assert SampleSettings(scheduler="euler-a").scheduler == "euler_a"
    assert canonical("DPMSolverSinglestepScheduler") == "DPMSolverSinglestepScheduler"
    with pytest.raises(UserError, match="did you mean 'euler'"):
        SampleSettings(scheduler="eulr")
    with pytest.raises(UserError, match="unknown scheduler 'NoScheduler'"):
        canonical("NoScheduler")
    with pytest.raises(UserError, match="does not sample a flow"):
        make_scheduler("ddim", RectifiedFlow(), {})


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "steps must be at least 1"), ({"strength": 0.0}, "strength must lie above 0"),
    ({"strength": 1.5}, "strength must lie above 0")])
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_sizes_and_initial_pictures(base: SD1) -> None:
    with pytest.raises(UserError, match="width 70 is not a multiple of 8 pixels; take 72"):
        sample(base, ["a"], [""], [1], settings(width=70))
    with pytest.raises(UserError, match="height 0"):
        sample(base, ["a"], [""], [1], settings(height=0))
    with pytest.raises(UserError, match="the initial picture is 8x8 pixels, not 32x24"):
        sample(base, ["a"], [""], [1], settings(), init_images=[Image.new("RGB", (8, 8))])
    with pytest.raises(UserError, match="leaves none to do"):
        sample(base, ["a"], [""], [1], settings(strength=0.1), init_images=[Image.new("RGB", (32, 24))])


def test_numbers_that_are_not_finite() -> None:
    broken: Base = random_sd1()
    next(broken.denoiser.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        sample(broken, ["a"], [""], [1], settings(steps=1))


def test_pictures_come_back_through_the_vae_as_in_diffusers(base: SD1, pipeline: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    pictures = [Image.fromarray(picture) for picture in noise]
    with torch.no_grad():
        pixels = torch.from_numpy(noise).permute(0, 3, 1, 2) / 127.5 - 1
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    back = given_back(base, pictures, 0, batch=2)
    for one, other in zip(back, expected, strict=True):
        assert np.abs(np.asarray(one, dtype=float) - other).max() <= 1
    noisy = [given_back(base, pictures, seed, noise=0.5) for seed in (0, 0, 1)]
    assert np.array_equal(noisy[0], noisy[1]) and not np.array_equal(noisy[0], noisy[2])
    assert not np.array_equal(noisy[0], back) and given_back(base, [], 0) == []
