"""Processes and batches that these tests share, with their noise levels written out in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from impasto.diffusion.process import DDPM, Prediction, Process, RectifiedFlow

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction", "flow")


def ddpm(prediction: Prediction = "epsilon", zero_snr: bool = False) -> DDPM:
    return DDPM(**STABLE_DIFFUSION, prediction=prediction, rescale_betas_zero_snr=zero_snr)


#: a process, and times inside it where nothing is singular
CASES: list[tuple[Process, Tensor]] = [
    (ddpm(), torch.tensor([0, 1, 500, 999])),
    (ddpm("v_prediction", zero_snr=True), torch.tensor([0, 1, 500, 998])),
    (RectifiedFlow(shift=3.0), torch.tensor([0.001, 0.25, 0.5, 0.999])),
]


def levels(process: Process, time: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, float64, by the definitions: a product of (1 - beta), or a straight line."""
    if isinstance(process, RectifiedFlow):
        s = time.numpy().astype(np.float64)
        return 1 - s, s
    assert isinstance(process, DDPM)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.array([np.sqrt(np.prod(1 - betas[: t + 1])) for t in range(1000)])
    if process.rescale_betas_zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root[time.numpy()], np.sqrt(1 - root[time.numpy()] ** 2)


def batch(size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x_0 and noise, (B, 4, 3, 5)."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn((2, size, 4, 3, 5), generator=generator, dtype=torch.float64)
    return x0.to(dtype), noise.to(dtype)
