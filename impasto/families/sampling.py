"""Drawing pictures with any base and any diffusers scheduler: from noise, or from a picture and noise.

A picture depends on its own prompt, negative prompt, seed and settings, and not on its neighbours in the batch,
beyond rounding. It is the one that diffusers' pipeline draws from `torch.Generator("cpu").manual_seed(seed)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.rng import picture_generator
from impasto.diffusion.process import Process
from impasto.families.base import Base, Caption, Geometry, TextStates
from impasto.families.schedulers import canonical, make_scheduler


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn. Raises `UserError` for what makes no sense."""

    #: of the solver
    steps: int = 30
    #: classifier-free guidance (Ho and Salimans 2022, as 1 + w); 1 or less: none, and no negative prompt
    guidance: float = 7.5
    #: a name of `schedulers.SCHEDULERS`, or of a diffusers class
    scheduler: str = "dpm++2m"
    #: pixels, multiples of the base's latent cell
    width: int = 512
    height: int = 512
    #: with initial pictures: how much of the way is drawn anew, 1 is all of it (diffusers' img2img)
    strength: float = 0.75

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler", canonical(self.scheduler))
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must lie above 0, up to 1, not {self.strength}")


@torch.no_grad()
def sample(base: Base, prompts: Sequence[Caption], negatives: Sequence[Caption], seeds: Sequence[int],
           settings: SampleSettings, *, init_images: Sequence[Image.Image] | None = None,
           on_step: Callable[[int, int], None] | None = None) -> list[Image.Image]:
    """One picture for each prompt, all in one batch.

    `init_images`, of the settings' size, are where the pictures begin (SDEdit: Meng et al. 2022), by the
    settings' strength. `on_step(done, steps)` is called after each step, and may raise to stop. Raises
    `UserError` for a size that the base cannot draw, and if the numbers stop being finite.
    """
    assert len(prompts) == len(negatives) == len(seeds) and prompts, "one negative prompt and one seed a prompt"
    check_size(base, settings.width, settings.height)
    device, generators = base.device, [picture_generator(seed) for seed in seeds]
    scheduler = make_scheduler(settings.scheduler, base.process, base.scheduler)
    scheduler.set_timesteps(settings.steps, device=device)
    first = 0 if init_images is None else _first_step(settings)
    times = scheduler.timesteps[first * scheduler.order:]
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * scheduler.order)
    guided = settings.guidance > 1
    condition = _condition(base, prompts, negatives if guided else (), settings)
    x = _beginning(base, scheduler, times, generators, settings, init_images)
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    steps, done = settings.steps - first, 0
    for i, t in enumerate(times):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        seen = torch.cat([seen, seen]) if guided else seen
        prediction = base.predict(seen, process_time(base.process, t).expand(len(seen)), condition).float()
        if guided:
            without, with_ = prediction.chunk(2)
            prediction = without + settings.guidance * (with_ - without)
        x = scheduler.step(prediction, t, x, **draws, return_dict=False)[0]
        while on_step and done < (i + 1) * steps // len(times):  # some solvers predict twice a step
            done += 1
            on_step(done, steps)
    return [_picture(base.decode_latents(one[None])) for one in x]  # one by one: it is the peak of memory


@torch.no_grad()
def given_back(base: Base, pictures: Sequence[Image.Image], seed: int, *, noise: float = 0.0,
               batch: int = 32) -> list[Image.Image]:
    """Pictures as they come through the base's VAE: with the look of what it draws, whatever they show.

    Their latents get `noise` of that standard deviation, theirs being about 1. All are of one size, which the base can
    draw.
    """
    found = []
    generator = picture_generator(seed)
    for start in range(0, len(pictures), batch):
        part = pictures[start:start + batch]
        pixels = torch.cat([_pixels(picture, *part[0].size) for picture in part])
        moments = base.encode_images(pixels.to(base.device))
        latents = base.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))
        draws = torch.randn(latents.shape, generator=generator).to(latents)
        found += [_picture(one[None]) for one in base.decode_latents(latents + noise * draws)]
    return found


def check_size(base: Base, width: int, height: int) -> None:
    """That the base can draw a picture of that size."""
    for name, pixels in (("width", width), ("height", height)):
        if pixels < base.grid or pixels % base.grid:
            near = max(round(pixels / base.grid), 1) * base.grid
            raise UserError(f"{name} {pixels} is not a multiple of {base.grid} pixels", fix=f"take {near}")


def process_time(process: Process, t: Tensor) -> Tensor:
    """A diffusers scheduler's timestep as the process's own time: a flow's runs from 0 to 1.

    For DDPM it may lie between two steps (Euler's do), which the network does not mind.
    """
    return t / process.scheduler_config()["num_train_timesteps"] if process.prediction == "flow" else t


def _condition(base: Base, prompts: Sequence[Caption], negatives: Sequence[Caption], settings: SampleSettings) -> Any:
    """What the denoiser is told, of negative prompts first; the pictures are whole ones of their size."""
    states = [*_text(base.encode_negatives, negatives), *_text(base.encode_text, prompts)]
    size = torch.tensor([[settings.height, settings.width]] * len(states))
    return base.condition(base.stack_text(states), Geometry(size, torch.zeros_like(size), size).to(base.device),
                          base.sampling_extras(len(negatives), len(prompts)))


def _text(encode: Callable[[Sequence[Caption]], TextStates], captions: Sequence[Caption]) -> list[TextStates]:
    """States of captions, each encoded once and by itself, so that they do not depend on the batch."""
    keys = [caption if isinstance(caption, str) else tuple(caption) for caption in captions]
    states = {key: encode([key]) for key in dict.fromkeys(keys)}
    return [states[key] for key in keys]


def _first_step(settings: SampleSettings) -> int:
    """The step that img2img begins with (as diffusers counts)."""
    left = min(int(settings.steps * settings.strength), settings.steps)
    if left < 1:
        raise UserError(f"strength {settings.strength} of {settings.steps} steps leaves none to do",
                        fix="raise one of them")
    return settings.steps - left


def _beginning(base: Base, scheduler: Any, times: Tensor, generators: list[torch.Generator],
               settings: SampleSettings, init_images: Sequence[Image.Image] | None) -> Tensor:
    """Latents (B, C, h, w), fp32, in the scheduler's own scale, at the first of `times`."""
    shape = (base.latent_channels, settings.height // base.cell, settings.width // base.cell)

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(base.device)

    if init_images is None:
        return noise() * getattr(scheduler, "init_noise_sigma", 1.0)
    assert len(init_images) == len(generators), "one initial picture a prompt"
    moments = torch.cat([base.encode_images(_pixels(picture, settings.width, settings.height))
                         for picture in init_images])
    latents = base.latents(moments.to(base.device), noise())
    if base.process.prediction == "flow":
        time = process_time(base.process, times[:1]).expand(len(latents))
        return base.process.add_noise(latents, noise(), time)
    return scheduler.add_noise(latents, noise(), times[:1])


def _pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    if picture.size != (width, height):
        raise UserError(f"the initial picture is {picture.width}x{picture.height} pixels, not {width}x{height}",
                        fix="fit it first")
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1


def _picture(pixels: Tensor) -> Image.Image:
    """The picture of pixels (1, 3, H, W). Raises `UserError` if they are not finite."""
    if not torch.isfinite(pixels).all():
        raise UserError("the picture came out as numbers that are not finite",
                        fix="use fp32, a lower guidance, or see whether an adapter's training has diverged")
    scaled = (pixels[0].float().cpu() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(scaled.permute(1, 2, 0).numpy())
