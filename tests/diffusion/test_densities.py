"""Densities of times: their inverse CDFs against the analytic CDFs, and against what diffusers draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from impasto.core.errors import UserError
from impasto.core.rng import Draws
from impasto.diffusion.densities import CosMap, Density, LogitNormal, Mode, Range, Uniform


def cdf_by_integral(pdf: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    grid = np.linspace(0, 1, 200_001)[1:-1]
    total = np.concatenate(([0.0], np.cumsum((pdf(grid)[1:] + pdf(grid)[:-1]) / 2 * np.diff(grid))))
    return lambda t: np.interp(t, grid, total)


def logit_normal(mean: float, std: float) -> Callable[[np.ndarray], np.ndarray]:
    """Esser et al. 2024, eq. 19."""
    return lambda t: (np.exp(-((np.log(t / (1 - t)) - mean) ** 2) / (2 * std**2))
                      / (std * math.sqrt(2 * math.pi) * t * (1 - t)))


DENSITIES = [
    (Uniform(), lambda t: t),
    (LogitNormal(), cdf_by_integral(logit_normal(0, 1))),
    (LogitNormal(0.8, 0.5), cdf_by_integral(logit_normal(0.8, 0.5))),
    (CosMap(), cdf_by_integral(lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2))),
    (Range(0.2, 0.6), lambda t: np.clip((t - 0.2) / 0.4, 0, 1)),
    (Range(0.5, 1.0, LogitNormal()), lambda t: cdf_by_integral(logit_normal(0, 1))(2 * t - 1)),
]
MODES = [Mode(), Mode(-0.9), Mode(1.7)]


@pytest.mark.parametrize(("density", "cdf"), DENSITIES)
def test_inverts_the_cdf(density: Density, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    u = np.linspace(0.001, 0.999, 999)
    t = density.inverse_cdf(torch.tensor(u)).numpy()
    np.testing.assert_allclose(cdf(t), u, atol=2e-5)


@pytest.mark.parametrize("scale", [1.29, -0.9])
def test_mode_is_the_papers_map(scale: float) -> None:
    """Esser et al. 2024, eq. 20, whose u runs the other way."""
    u = np.linspace(0, 1, 101)
    expected = 1 - u - scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)
    np.testing.assert_allclose(Mode(scale).inverse_cdf(torch.tensor(1 - u)).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("density", [density for density, _ in DENSITIES] + MODES)
def test_never_leaves_the_unit_interval_nor_decreases(density: Density) -> None:
    ends = torch.tensor([0.0, 2**-24, 1 - 2**-24])  # the smallest and largest of torch.rand
    t = density.inverse_cdf(torch.cat([ends[:2], torch.linspace(0.001, 0.999, 999), ends[2:]]))
    assert t.dtype == torch.float32
    assert (t >= 0).all() and (t <= 1).all() and (t.diff() >= -1e-7).all()


@pytest.mark.parametrize(("density", "cdf"), DENSITIES)
def test_draws_have_the_density(density: Density, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    """Kolmogorov's test: sup |empirical CDF - CDF| √n is below 1.95 in 999 of 1000 cases (the seed is fixed)."""
    n = 4000
    u = Draws(0, 0, range(n)).uniform("time")
    t = np.sort(density.inverse_cdf(u).double().numpy())
    expected = cdf(t)
    apart = max(np.abs(expected - np.arange(n) / n).max(), np.abs(expected - np.arange(1, n + 1) / n).max())
    assert apart * math.sqrt(n) < 1.95


@pytest.mark.parametrize(("density", "options"), [
    (LogitNormal(0.5, 0.8), {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8}),
    (Mode(1.29), {"weighting_scheme": "mode", "mode_scale": 1.29}),
    (Uniform(), {"weighting_scheme": "none"}),
])
def test_same_distribution_as_diffusers(density: Density, options: dict) -> None:
    n = 20_000
    theirs = compute_density_for_timestep_sampling(
        batch_size=n, generator=torch.Generator().manual_seed(0), **options).double().sort().values
    ours = density.inverse_cdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    # two-sample distance, theirs against exact quantiles of ours
    rank = torch.searchsorted(ours, theirs) / n
    apart = (rank - torch.arange(n) / n).abs().max().item()
    assert apart * math.sqrt(n) < 1.95


@pytest.mark.parametrize("make", [
    lambda: LogitNormal(0.0, 0.0),
    lambda: Mode(2.0),
    lambda: Mode(-1.1),
    lambda: Range(0.5, 0.5),
    lambda: Range(-0.1, 0.5),
    lambda: Range(0.0, 1.1),
])
def test_refuses_what_is_no_density(make: Callable[[], Density]) -> None:
    with pytest.raises(UserError):
        make()
