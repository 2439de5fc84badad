"""Where a picture's drawing begins: with noise, or a picture and noise; what the denoiser is shown beside it, and what
of the picture stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from impasto.core.errors import UserError
from impasto.diffusion.process import Process
from impasto.families.base import Base
from impasto.families.sample_settings import SampleSettings


@dataclass(frozen=True)
class Kept:
    """What stays of pictures where their masks are black, on a base that is shown no mask (diffusers' inpainting with
    four channels): after each step it is put back, as noisy as the rest is."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # likewise
    mask: Tensor  # (B, 1, h, w), 1 where the picture is drawn anew

    def put_back(self, base: Base, scheduler: Any, x: Tensor, time: Tensor | None) -> Tensor:
        """`x` (B, C, h, w) with what stays in its place, at `time` (1,); None: at the end, without noise."""
        old = self.latents if time is None else noised(base, scheduler, self.latents, self.noise, time)
        return (1 - self.mask) * old + self.mask * x


@dataclass(frozen=True)
class Beginning:
    """The first step's state."""

    x: Tensor  # (B, C, h, w), fp32, in the scheduler's own scale
    extras: dict[str, Tensor]  # for the base's condition
    kept: Kept | None


def begin(base: Base, scheduler: Any, times: Tensor, generators: Sequence[torch.Generator], settings: SampleSettings,
          pictures: Sequence[Image.Image] | None, masks: Sequence[Image.Image] | None, *,
          refined: bool = False) -> Beginning:
    """At the first of `times`, of pictures and masks of the settings' size, if there are any. `refined`: another base,
    that is shown no mask, goes on.

    The order in which each picture's generator is asked for noise is diffusers'.
    """
    shape = (base.latent_channels, settings.height // base.cell, settings.width // base.cell)

    def noise(use: str = "", shape: Sequence[int] = shape) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(base.device)

    def moments(pixels: Tensor) -> Tensor:
        return torch.cat([base.encode_images(one[None]) for one in pixels]).to(base.device)

    edits = "picture" in base.extras
    pixels = mask = latents = None
    if pictures is not None:
        assert len(pictures) == len(generators), "one initial picture a prompt"
        pixels = torch.cat([to_pixels(picture, settings.width, settings.height) for picture in pictures])
    if masks is not None:
        if pixels is None:
            raise UserError("a mask is of a picture, and there is none", fix="give the picture too")
        mask = torch.cat([to_mask(each, settings.width, settings.height) for each in masks])
    keeps, anew = mask is not None and not base.extras, pixels is None or edits or (
        mask is not None and settings.strength == 1)
    if pixels is not None and (keeps or not anew):
        latents = base.latents(moments(pixels), noise())
    drawn = noise()
    x = drawn * getattr(scheduler, "init_noise_sigma", 1.0)
    if not anew:
        assert latents is not None
        x = noised(base, scheduler, latents, drawn, times[:1])
    extras: dict[str, Tensor] = {}
    if edits and pixels is not None:
        extras["picture"] = moments(pixels)
    if mask is not None and pixels is not None and base.extras:
        extras |= {"mask": mask.to(base.device)}
        if "masked" in base.extras:
            extras["masked"] = moments(pixels * (mask < 0.5))
    kept, seen = None, base.seen(extras, noise)
    if mask is not None and pixels is not None and (keeps or refined):
        if latents is None:
            latents = base.latents(moments(pixels), noise())
        elif keeps:
            noise()  # diffusers asks for the masked picture's too, which nobody then sees
        kept = Kept(latents, drawn, F.interpolate(mask, size=shape[1:]).to(base.device))
    return Beginning(x, seen, kept)


def nothing_kept(base: Base, settings: SampleSettings, count: int
                 ) -> tuple[list[Image.Image] | None, list[Image.Image] | None]:
    """So many pictures and masks of which a base for inpainting keeps nothing; of others, that need no masks, none."""
    if "mask" not in base.extras:
        return None, None
    size = (settings.width, settings.height)
    return [Image.new("RGB", size)] * count, [Image.new("L", size, 255)] * count


def noised(base: Base, scheduler: Any, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Latents on their way at the scheduler's `time` (1,)."""
    if base.process.prediction == "flow":
        return base.process.add_noise(latents, noise, process_time(base.process, time).expand(len(latents)))
    return scheduler.add_noise(latents, noise, time)


def process_time(process: Process, t: Tensor) -> Tensor:
    """A diffusers scheduler's timestep as the process's own time: a flow's runs from 0 to 1.

    For DDPM it may lie between two steps (Euler's do), which the network does not mind.
    """
    return t / process.scheduler_config()["num_train_timesteps"] if process.prediction == "flow" else t


def first_step(settings: SampleSettings) -> int:
    """The step that img2img begins with (as diffusers counts)."""
    left = min(int(settings.steps * settings.strength), settings.steps)
    if left < 1:
        raise UserError(f"strength {settings.strength} of {settings.steps} steps leaves none to do",
                        fix="raise one of them")
    return settings.steps - left


def to_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    _check(picture, width, height, "initial picture")
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1


def to_mask(picture: Image.Image, width: int, height: int) -> Tensor:
    """(1, 1, H, W), 1 where it is lighter than the middle grey, else 0."""
    _check(picture, width, height, "mask")
    return torch.from_numpy(np.asarray(picture.convert("L")) >= 128)[None, None].float()


def _check(picture: Image.Image, width: int, height: int, what: str) -> None:
    if picture.size != (width, height):
        raise UserError(f"the {what} is {picture.width}x{picture.height} pixels, not {width}x{height}",
                        fix="fit it first")
