"""Pixels to latents and back by diffusers' AutoencoderKL, for every family that has one.

The VAE computes in fp32 whatever the rest does, autocast included: in fp16 those of SDXL, and some of SD 1.x,
overflow to black or NaN pictures, and bf16's eight bits of mantissa show in the picture and in cached latents. It
is small, and training never waits for it once latents are cached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: of every VAE's weights and computation
DTYPE = torch.float32


def cell(vae: Any) -> int:
    """Pixels along one side of a latent cell: one halving less than the VAE has blocks."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Moments (B, 2C, h, w), mean and log-variance, fp32, of pixels (B, 3, H, W) in [-1, 1]."""
    pixels = _placed(vae, pixels)
    with torch.autocast(pixels.device.type, enabled=False):
        hidden = vae.encoder(pixels)
        return hidden if vae.quant_conv is None else vae.quant_conv(hidden)


def sample(vae: Any, moments: Tensor, noise: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w): mean + std · noise (the log-variance clamped to [-30, 20], as in LDM's code)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise.to(mean)
    return (latents - _shift(vae)) * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in about [-1, 1], fp32, of scaled latents (B, C, h, w)."""
    latents = _placed(vae, latents) / vae.config.scaling_factor + _shift(vae)
    with torch.autocast(latents.device.type, enabled=False):
        hidden = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
        return vae.decoder(hidden)


def _shift(vae: Any) -> float:
    """The middle of the latents, which newer VAEs (SD 3) are told."""
    return vae.config.shift_factor or 0.0


def _placed(vae: nn.Module, x: Tensor) -> Tensor:
    """`x` where the VAE is, and in its precision."""
    weight = next(vae.parameters())
    return x.to(weight.device, weight.dtype)
