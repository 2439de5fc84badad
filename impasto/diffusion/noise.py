"""Noise for training: Gaussian, and three changes to it. Each is a function of the batch's draws alone.

Noise is (B, C, h, w), fp32; a sample's row does not depend on its neighbours'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from impasto.core.rng import Draws


def gaussian(draws: Draws, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape)."""
    return draws.normal("noise", shape)


def add_offset(noise: Tensor, draws: Draws, strength: float) -> Tensor:
    """Shift each channel as a whole by `strength` times a draw: pictures may turn very dark or bright.

    Guttenberg 2023, "Diffusion with offset noise" (there 0.1; SDXL's own training: 0.05).
    """
    return noise + strength * draws.normal("noise.offset", (noise.shape[1], 1, 1))


def add_pyramid(noise: Tensor, draws: Draws, discount: float, levels: int = 6) -> Tensor:
    """Add ever coarser noise: each of `levels` has half the size and `discount` times the weight of the last.

    Each sample is then scaled back to standard deviation 1. Whitaker 2023, "Multi-resolution noise", with the
    ratio 2, which he draws from 2 to 4, and the scale of a sample, which he takes from the batch.
    """
    height, width = noise.shape[-2:]
    for level in range(1, levels + 1):
        size = max(1, height >> level), max(1, width >> level)
        coarse = draws.normal(f"noise.pyramid.{level}", (noise.shape[1], *size))
        noise = noise + discount**level * torch.nn.functional.interpolate(
            coarse, size=(height, width), mode="bilinear")
        if size == (1, 1):
            break
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def perturb(noise: Tensor, draws: Draws, strength: float) -> Tensor:
    """Input perturbation: noise for x_t, while the target keeps `noise` (Ning et al. 2023; there 0.1)."""
    return noise + strength * draws.normal("noise.perturbation", noise.shape[1:])
