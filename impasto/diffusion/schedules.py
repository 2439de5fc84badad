"""Beta schedules of DDPM: how much noise each of the T steps of the forward process adds.

beta_t is the variance of q(x_t | x_{t-1}) (Ho et al. 2020, eq. 2), alphas_cumprod the product of 1 - beta.
All of it is plain numpy in float64: T numbers, made once, the same on every device and under fake tensors.
"""

from __future__ import annotations

import math

import numpy as np

from impasto.core.errors import UserError, nearest


def linear(steps: int, start: float, end: float) -> np.ndarray:
    """(T,) betas evenly spaced from `start` to `end`. Ho et al. 2020, section 4: 1e-4 to 0.02 at T = 1000."""
    return np.linspace(start, end, steps)


def scaled_linear(steps: int, start: float, end: float) -> np.ndarray:
    """(T,) betas with evenly spaced square roots. Latent diffusion; Stable Diffusion: 0.00085 to 0.012."""
    return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2


def cosine(steps: int, start: float = 0.0, end: float = 0.0) -> np.ndarray:
    """(T,) betas of alphas_cumprod = cos²(π/2 · (t/T + 0.008)/1.008), each at most 0.999.

    Nichol and Dhariwal 2021, eq. 17; squaredcos_cap_v2 in diffusers. `start` and `end` have no part in it.
    """
    t = np.arange(steps + 1) / steps
    alphas_cumprod = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


#: diffusers' names of the schedules
SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "squaredcos_cap_v2": cosine}


def betas(schedule: str, steps: int, start: float, end: float) -> np.ndarray:
    """The (T,) betas of a named schedule. `UserError` for an unknown name."""
    if schedule not in SCHEDULES:
        raise UserError(f"unknown beta schedule {schedule!r}", where="beta_schedule",
                        fix=nearest(schedule, SCHEDULES))
    return SCHEDULES[schedule](steps, start, end)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """(T,) betas changed so that the last step is pure noise: alphas_cumprod_T = 0, beta_T = 1.

    The square roots of alphas_cumprod are shifted to end at zero, then scaled to begin where they began
    (Lin et al. 2023, Algorithm 1).
    """
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - alphas_cumprod / np.concatenate(([1.0], alphas_cumprod[:-1]))
