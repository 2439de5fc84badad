"""Drawing pictures with any base and any diffusers scheduler: from noise, or from a picture and noise.

A picture depends on its own prompt, negative prompt, seed and settings, and not on its neighbours in the batch,
beyond rounding. It is the one that diffusers' pipeline draws from `torch.Generator("cpu").manual_seed(seed)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.rng import picture_generator
from impasto.families.base import Base, Caption, Geometry, TextStates
from impasto.families.beginning import begin, first_step, process_time, to_pixels
from impasto.families.guidance import Guidance
from impasto.families.sample_settings import SampleSettings, check_size
from impasto.families.schedulers import make_scheduler


@torch.no_grad()
def sample(base: Base, prompts: Sequence[Caption], negatives: Sequence[Caption], seeds: Sequence[int],
           settings: SampleSettings, *, init_images: Sequence[Image.Image] | None = None,
           masks: Sequence[Image.Image] | None = None, refiner: Base | None = None,
           on_step: Callable[[int, int], None] | None = None) -> list[Image.Image]:
    """One picture for each prompt, all in one batch.

    `init_images`, of the settings' size, are where the pictures begin (SDEdit: Meng et al. 2022), by the settings'
    strength; of `masks` with them, what is white is drawn anew. An inpainting base needs both, and one that edits
    pictures the first, which it begins without. A `refiner` takes the last steps, from the settings' handover on.
    `on_step(done, steps)` is called after each step, and may raise to stop. Raises `UserError` for a size that the base
    cannot draw, for pictures that it lacks or has no place for, and if the numbers stop being finite.
    """
    assert len(prompts) == len(negatives) == len(seeds) and prompts, "one negative prompt and one seed a prompt"
    check_size(base.grid, settings.width, settings.height)
    generators, edits = [picture_generator(seed) for seed in seeds], "picture" in base.extras
    begun, x, done = None, torch.empty(0), 0
    for stage, network in enumerate((base,) if refiner is None else (base, refiner)):
        scheduler = make_scheduler(settings.scheduler, network.process, network.scheduler)
        scheduler.set_timesteps(settings.steps, device=base.device)
        first = 0 if init_images is None or edits else first_step(settings)
        start, split, end = first * scheduler.order, _split(scheduler, settings), len(scheduler.timesteps)
        change = end if refiner is None else max(split, start)
        span = range(start, change) if stage == 0 else range(change, end)
        if span.start and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(span.start)
        if begun is None:
            begun = begin(base, scheduler, scheduler.timesteps[start:], generators, settings, init_images, masks,
                          refined=refiner is not None)
            x = begun.x
        guidance = Guidance(settings.guidance, settings.image_guidance if edits and stage == 0 else None)
        condition = _condition(network, prompts, guidance.negatives(negatives), settings,
                               guidance.extras(begun.extras if stage == 0 else {}))
        draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for i in span:
            t = scheduler.timesteps[i]
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            seen = torch.cat([seen] * guidance.ways)
            prediction = network.predict(seen, process_time(network.process, t).expand(len(seen)), condition).float()
            x = scheduler.step(guidance.joined(prediction), t, x, **draws, return_dict=False)[0]
            if begun.kept is not None and not network.extras:
                x = begun.kept.put_back(base, scheduler, x, scheduler.timesteps[i + 1:i + 2] if i + 1 < end else None)
            while on_step and done < (i + 1 - start) * (settings.steps - first) // (end - start):
                done += 1  # some solvers predict twice a step
                on_step(done, settings.steps - first)
    return [_picture(base.decode_latents(one[None])) for one in x]  # one by one: it is the peak of memory


def _split(scheduler: Any, settings: SampleSettings) -> int:
    """The first of a scheduler's timesteps at which a refiner takes over, counted as diffusers does; of solvers that
    predict twice a step, not in the middle of one."""
    count = scheduler.config.num_train_timesteps
    split = int((scheduler.timesteps >= round(count - settings.handover * count)).sum())
    return split + split % scheduler.order


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
        pixels = torch.cat([to_pixels(picture, *part[0].size) for picture in part])
        moments = base.encode_images(pixels.to(base.device))
        latents = base.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))
        draws = torch.randn(latents.shape, generator=generator).to(latents)
        found += [_picture(one[None]) for one in base.decode_latents(latents + noise * draws)]
    return found


def _condition(base: Base, prompts: Sequence[Caption], negatives: Sequence[Caption], settings: SampleSettings,
               extras: Mapping[str, Tensor]) -> Any:
    """What the denoiser is told, of negative prompts first; the pictures are whole ones of their size."""
    states = [*_text(base.encode_negatives, negatives), *_text(base.encode_text, prompts)]
    size = torch.tensor([[settings.height, settings.width]] * len(states))
    return base.condition(base.stack_text(states), Geometry(size, torch.zeros_like(size), size).to(base.device),
                          {**base.sampling_extras(len(negatives), len(prompts)), **extras})


def _text(encode: Callable[[Sequence[Caption]], TextStates], captions: Sequence[Caption]) -> list[TextStates]:
    """States of captions, each encoded once and by itself, so that they do not depend on the batch."""
    keys = [caption if isinstance(caption, str) else tuple(caption) for caption in captions]
    states = {key: encode([key]) for key in dict.fromkeys(keys)}
    return [states[key] for key in keys]


def _picture(pixels: Tensor) -> Image.Image:
    """The picture of pixels (1, 3, H, W). Raises `UserError` if they are not finite."""
    if not torch.isfinite(pixels).all():
        raise UserError("the picture came out as numbers that are not finite",
                        fix="use fp32, a lower guidance, or see whether an adapter's training has diverged")
    scaled = (pixels[0].float().cpu() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(scaled.permute(1, 2, 0).numpy())
