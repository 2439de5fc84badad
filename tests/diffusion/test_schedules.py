"""Beta schedules against their formulas and against diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, rescale_zero_terminal_snr

from impasto.core.errors import UserError
from impasto.diffusion import schedules


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("steps", [1000, 50])
def test_agrees_with_diffusers(name: str, steps: int) -> None:
    ours = schedules.betas(name, steps, 0.00085, 0.012)
    theirs = DDPMScheduler(steps, 0.00085, 0.012, beta_schedule=name).betas.double().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)


def test_cosine_is_nichol_and_dhariwals() -> None:
    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    alphas_cumprod = np.cumprod(1 - schedules.betas("squaredcos_cap_v2", 1000, 0.0, 0.0))
    for t in (1, 2, 500, 998):
        assert alphas_cumprod[t - 1] == pytest.approx(f(t) / f(0), rel=1e-10)
    assert schedules.cosine(1000)[-1] == 0.999


def test_zero_terminal_snr_is_lins_algorithm_1() -> None:
    betas = schedules.betas("scaled_linear", 1000, 0.00085, 0.012)
    ours = schedules.rescale_zero_terminal_snr(betas)
    theirs = rescale_zero_terminal_snr(torch.tensor(betas)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-14)
    root = np.sqrt(np.cumprod(1 - ours))
    before = np.sqrt(np.cumprod(1 - betas))
    assert ours[-1] == 1 and root[-1] == 0  # exactly
    assert root[0] == pytest.approx(before[0], rel=1e-14)
    # an affine map of the square roots: equal ratios of differences
    np.testing.assert_allclose(
        root[:-1] / (before[:-1] - before[-1]), root[0] / (before[0] - before[-1]), rtol=1e-9)


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(UserError, match="scaled_linear"):
        schedules.betas("scaled-linear", 1000, 0.1, 0.2)
