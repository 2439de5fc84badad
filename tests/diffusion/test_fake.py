"""The training path runs on fake tensors, and nothing fake outlives the trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from impasto.core.rng import Draws
from impasto.diffusion import losses, noise
from impasto.diffusion.densities import CosMap, Density, LogitNormal, Mode, Range, Uniform
from impasto.diffusion.process import DDPM, Process, RectifiedFlow
from tests.diffusion.processes import ddpm

DENSITIES: list[Density] = [Uniform(), LogitNormal(), Mode(), CosMap(), Range(0.1, 0.9, LogitNormal())]


def loss(process: Process, density: Density, draws: Draws, kind: losses.Kind, schedule: losses.DeltaSchedule,
         weighting: losses.Weighting) -> Tensor:
    """Everything that a training step asks of this package."""
    x0 = draws.normal("picture", (4, 8, 8))
    target_noise = noise.gaussian(draws, (4, 8, 8))
    target_noise = noise.add_pyramid(noise.add_offset(target_noise, draws, 0.1), draws, 0.3)
    time = process.times(draws.uniform("time"), density)
    x_t = process.add_noise(x0, noise.perturb(target_noise, draws, 0.1), time)
    prediction = process.convert(x_t, x_t, time, "v_prediction", process.prediction)
    each = losses.elementwise(prediction, process.target(x0, target_noise, time), kind,
                              losses.delta(process, time, 0.1, schedule))
    return each.mean((1, 2, 3)) * losses.weight(process, time, weighting)


@pytest.mark.parametrize("process", [ddpm(), ddpm("v_prediction", zero_snr=True), RectifiedFlow(3.0)])
def test_the_training_path_runs_on_fake_tensors(process: Process) -> None:
    cases = [(density, "huber", "snr", "min_snr") for density in DENSITIES] + [
        (Uniform(), "mse", "constant", "debiased"), (Uniform(), "l1", "exponential", "p2"),
        (Uniform(), "smooth_l1", "constant", "none")]
    for case in cases:
        density, options = case[0], case[1:]
        before = loss(process, density, Draws(0, 0, [0, 1]), *options)
        with FakeTensorMode():
            fake = loss(process, density, Draws(0, 0, [0, 1]), *options)
        assert isinstance(fake, FakeTensor) and fake.shape == (2,) and fake.dtype == before.dtype
        after = loss(process, density, Draws(0, 0, [0, 1]), *options)
        assert torch.equal(before, after)


def test_a_process_made_among_fake_tensors_is_real_afterwards() -> None:
    with FakeTensorMode():
        process = DDPM(rescale_betas_zero_snr=True)
        process.snr(torch.zeros(2, dtype=torch.long))
    time = torch.tensor([0, 999])
    assert torch.equal(process.snr(time), DDPM(rescale_betas_zero_snr=True).snr(time))
