"""The processes against their formulas in float64, against Bayes' rule, and against diffusers' schedulers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from impasto.core.errors import UserError
from impasto.diffusion.densities import CosMap, Density, LogitNormal, Uniform
from impasto.diffusion.process import (
    DDPM,
    Prediction,
    Process,
    RectifiedFlow,
    process_from_scheduler_config,
    resolution_shift,
)
from tests.diffusion.processes import CASES, KINDS, STABLE_DIFFUSION, batch, ddpm, levels

close = torch.testing.assert_close


def row(values: np.ndarray) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def as_kind(kind: Prediction, alpha: Tensor, sigma: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """A prediction of each kind by its definition."""
    v = alpha * noise - sigma * x0
    return {"epsilon": noise, "sample": x0, "v_prediction": v, "flow": noise - x0}[kind]


# --- forward -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("process", "time"), CASES)
def test_noise_levels(process: Process, time: Tensor) -> None:
    alpha, sigma = levels(process, time)
    x0, noise = batch()
    close(process.add_noise(x0, noise, time), row(alpha) * x0 + row(sigma) * noise, rtol=1e-11, atol=1e-11)
    single = process.add_noise(x0.float(), noise.float(), time)
    assert single.dtype == torch.float32
    close(single.double(), row(alpha) * x0 + row(sigma) * noise, rtol=1e-6, atol=1e-6)
    snr = process.snr(time)
    assert snr.dtype == torch.float32 and snr.shape == (4,)
    close(snr.double(), torch.tensor(alpha**2 / sigma**2), rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_agrees_with_diffusers_in_training(kind: Prediction, zero_snr: bool) -> None:
    process = ddpm(kind, zero_snr)
    scheduler = DDPMScheduler.from_config(process.scheduler_config())
    time = torch.arange(1000)
    x0, noise = batch(1000, torch.float32)
    # where one of two factors is small, theirs is sqrt(1 - fp32 number near 1), right to some 1e-4 only
    close(process.add_noise(x0, noise, time), scheduler.add_noise(x0, noise, time), rtol=1e-4, atol=2e-5)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, time)}[kind]
    close(process.target(x0, noise, time), expected, rtol=1e-4, atol=2e-5)
    close(process.snr(time), compute_snr(scheduler, time), rtol=3e-3, atol=1e-6)


def test_half_precision_latents_keep_their_noise_level() -> None:
    process, time = ddpm(), torch.tensor([0, 1, 500, 999])
    x0, noise = (x.to(torch.bfloat16) for x in batch())
    noisy = process.add_noise(x0, noise, time)
    assert noisy.dtype == torch.float32
    close(noisy, process.add_noise(x0.float(), noise.float(), time), rtol=0, atol=0)


def test_flow_agrees_with_diffusers() -> None:
    process = RectifiedFlow(shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(process.scheduler_config())
    sigmas = process.shifted(torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64))
    close(sigmas.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    x0, noise = batch(1000, torch.float32)
    theirs = scheduler.scale_noise(x0[:50], scheduler.timesteps[::20], noise[:50])
    close(process.add_noise(x0[:50], noise[:50], scheduler.sigmas[::20]), theirs)
    # an Euler step of the whole length along the target leads from noise to data
    one = torch.ones(50)
    close(process.add_noise(x0[:50], noise[:50], one) - process.target(x0[:50], noise[:50], one), x0[:50])


def test_resolution_shift_keeps_the_uncertainty() -> None:
    # Esser et al. 2024, eq. 22: a constant picture of n cells at time t is known to within t/(1 - t)/sqrt(n)
    s = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    shift = resolution_shift(4096, 1024)
    shifted = RectifiedFlow(shift).shifted(s)
    assert shift == 2.0
    close(shifted / (1 - shifted) / 4096**0.5, s / (1 - s) / 1024**0.5)


# --- times ---------------------------------------------------------------------------------------------
def test_ddpm_times_part_the_unit_interval_evenly() -> None:
    process = ddpm()
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(process.times(u, Uniform()), torch.arange(1000))
    ends = process.times(torch.tensor([0.0, 1 - 2**-24]), CosMap())
    assert ends.tolist() == [0, 999] and ends.dtype == torch.int64


@pytest.mark.parametrize("density", [Uniform(), LogitNormal(0.5, 1.2)])
def test_flow_times_are_the_densitys_then_shifted(density: Density) -> None:
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    s = density.inverse_cdf(u)
    close(RectifiedFlow(3.0).times(u, density), 3 * s / (1 + 2 * s))
    close(RectifiedFlow(1.0).times(u, density), s)


@pytest.mark.parametrize(("process", "time"), CASES)
def test_fraction_grows_from_data_to_noise(process: Process, time: Tensor) -> None:
    fraction = process.fraction(time)
    expected = time / 1000 if isinstance(process, DDPM) else time
    close(fraction, expected.float())


# --- predictions ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("process", "time"), CASES)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_convert(process: Process, time: Tensor, source: Prediction, to: Prediction) -> None:
    alpha, sigma = (row(level) for level in levels(process, time))
    x0, noise = batch()
    x_t = process.add_noise(x0, noise, time)
    prediction = as_kind(source, alpha, sigma, x0, noise)
    # a wrong prediction too: what any kind says about x_0 and the noise must explain the same x_t
    close(process.convert(prediction, x_t, time, source, to), as_kind(to, alpha, sigma, x0, noise),
          rtol=1e-7, atol=1e-7)
    wrong = prediction + 0.1
    x0_hat = process.convert(wrong, x_t, time, source, "sample")
    noise_hat = process.convert(wrong, x_t, time, source, "epsilon")
    close(alpha * x0_hat + sigma * noise_hat, x_t, rtol=1e-7, atol=1e-7)
    close(process.convert(wrong, x_t, time, source, to), as_kind(to, alpha, sigma, x0_hat, noise_hat),
          rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_target_is_of_the_process_kind(kind: Prediction) -> None:
    process, time = ddpm(kind), torch.tensor([0, 10, 500, 999])
    alpha, sigma = (row(level) for level in levels(process, time))
    x0, noise = batch()
    close(process.target(x0, noise, time), as_kind(kind, alpha, sigma, x0, noise), rtol=1e-11, atol=1e-11)


def test_pure_noise_says_nothing_about_the_picture() -> None:
    x0, noise = batch(2)
    process, time = ddpm("v_prediction", zero_snr=True), torch.tensor([500, 999])
    x_t = process.add_noise(x0, noise, time)
    close(x_t[1], noise[1], rtol=0, atol=0)
    close(process.target(x0, noise, time)[1], -x0[1], rtol=0, atol=0)
    close(process.convert(-x0, x_t, time, "v_prediction", "sample")[1], x0[1], rtol=0, atol=0)
    with pytest.raises(UserError, match="pure noise"):
        process.convert(noise, x_t, time, "epsilon", "sample")
    close(process.convert(noise, x_t, time, "epsilon", "epsilon"), noise)
    process.convert(noise[:1], x_t[:1], time[:1], "epsilon", "sample")  # elsewhere there is an answer
    with pytest.raises(UserError, match="no noise"):
        RectifiedFlow().convert(x0, x0, torch.tensor([0.0, 0.5]), "sample", "flow")
    with pytest.raises(UserError, match="pure noise"):
        RectifiedFlow().convert(x0, x0, torch.tensor([1.0, 0.5]), "epsilon", "flow")


def test_unknown_kind() -> None:
    x0, _ = batch(1)
    with pytest.raises(UserError, match="v_prediction"):
        ddpm().convert(x0, x0, torch.tensor([3]), "epsilon", "v-prediction")


# --- backward ------------------------------------------------------------------------------------------
def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0), integrated on a grid of x_{t-1}."""
    process = DDPM(num_train_timesteps=10, beta_start=0.05, beta_end=0.4)
    betas = np.linspace(0.05, 0.4, 10)
    x0, x_t = 0.7, -0.4
    points = torch.tensor([[[x0]], [[x_t]]], dtype=torch.float64)
    grid = np.linspace(-12, 12, 200_001)
    for t in range(1, 10):
        acp = np.prod(1 - betas[:t])
        log = (-0.5 * (x_t - np.sqrt(1 - betas[t]) * grid) ** 2 / betas[t]
               - 0.5 * (grid - np.sqrt(acp) * x0) ** 2 / (1 - acp))
        p = np.exp(log - log.max())
        mean = (p * grid).sum() / p.sum()
        variance = (p * (grid - mean) ** 2).sum() / p.sum()
        ours = process.posterior(*points, torch.tensor([t]))
        assert ours[0].item() == pytest.approx(mean, abs=1e-7)
        assert ours[1].item() == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_strided_posterior_is_bayes_rule(zero_snr: bool) -> None:
    """Two Gaussians multiplied by their precisions: what x_previous knows from x_0, and from x_t."""
    process = ddpm("v_prediction", zero_snr)
    time, previous = torch.tensor([1, 400, 900, 999]), torch.tensor([0, 100, 880, 500])
    alpha, _ = levels(process, time)
    alpha_prev, sigma_prev = levels(process, previous)
    x0, x_t = batch()
    ratio = alpha / alpha_prev
    precision = 1 / sigma_prev**2 + ratio**2 / (1 - ratio**2)
    mean = row(1 / precision) * (row(alpha_prev / sigma_prev**2) * x0 + row(ratio / (1 - ratio**2)) * x_t)
    ours = process.posterior(x0, x_t, time, previous)
    close(ours[0], mean, rtol=1e-9, atol=1e-9)
    close(ours[1], row(1 / precision), rtol=1e-9, atol=1e-12)


def test_the_last_step_back_is_the_picture_itself() -> None:
    x0, x_t = batch(2)
    mean, variance = ddpm().posterior(x0, x_t, torch.tensor([0, 300]), torch.tensor([-1, -1]))
    close(mean, x0)
    assert variance.count_nonzero() == 0


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1000, 20])
def test_ancestral_step_agrees_with_diffusers(
        variance: Literal["fixed_small", "fixed_large"], kind: Prediction, steps: int) -> None:
    process = ddpm(kind)
    scheduler = DDPMScheduler.from_config(
        process.scheduler_config(), variance_type=variance, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    # theirs adds noise to a strided chain's very last step, whose result is x_0: left out
    for index in (0, steps // 2, steps - 2, *([steps - 1] if steps == 1000 else [])):
        t = int(scheduler.timesteps[index])
        x_t, prediction = batch(1, torch.float32)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
        theirs = scheduler.step(prediction, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
        previous = torch.tensor([t - 1000 // steps])
        ours = process.ancestral_step(prediction, x_t, torch.tensor([t]), noise, previous, variance)
        close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_ancestral_sampling_draws_the_data() -> None:
    """With the exact prediction for Gaussian data of mean m, deviation s, the chain ends in that Gaussian."""
    process = DDPM(num_train_timesteps=200, beta_start=5e-4, beta_end=0.1)
    m, s = 1.5, 0.5
    alphas = np.sqrt(process.alphas_cumprod)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((20_000, 1), generator=generator)
    for t in reversed(range(200)):
        a, variance = alphas[t], alphas[t] ** 2 * s**2 + 1 - alphas[t] ** 2
        expected_noise = np.sqrt(1 - a**2) * (x - a * m) / variance  # E[noise | x_t]
        x = process.ancestral_step(expected_noise, x, torch.full((len(x),), t),
                                   torch.randn(x.shape, generator=generator))
    assert x.mean().item() == pytest.approx(m, abs=0.02)
    assert x.std().item() == pytest.approx(s, abs=0.02)


# --- configs -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("process", [
    ddpm(), ddpm("v_prediction", zero_snr=True), RectifiedFlow(3.0), DDPM(beta_schedule="squaredcos_cap_v2"),
    DDPM(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3), prediction="sample"),
])
def test_config_round_trip(process: Process) -> None:
    assert process_from_scheduler_config(process.scheduler_config()) == process


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_reads_the_configs_of_diffusers(scheduler: type) -> None:
    made = scheduler(**STABLE_DIFFUSION, prediction_type="v_prediction")
    process = process_from_scheduler_config(made.config)
    assert process == ddpm("v_prediction")
    np.testing.assert_allclose(process.alphas_cumprod, made.alphas_cumprod.double().numpy(), rtol=1e-5)
    again = scheduler.from_config(process.scheduler_config())
    close(again.betas, made.betas, rtol=0, atol=0)
    assert again.config.prediction_type == "v_prediction"


def test_reads_flows_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert process_from_scheduler_config(scheduler.config) == RectifiedFlow(3.0)
    assert process_from_scheduler_config(json.loads(scheduler.to_json_string())) == RectifiedFlow(3.0)
    solver = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction")
    assert process_from_scheduler_config(solver.config) == RectifiedFlow(2.0)


def test_trained_betas() -> None:
    betas = np.linspace(0.01, 0.3, 20)
    scheduler = DDPMScheduler(20, trained_betas=betas.tolist())
    process = process_from_scheduler_config(scheduler.config)
    assert isinstance(process, DDPM)
    np.testing.assert_allclose(process.betas, betas)
    assert process.fraction(torch.tensor([10])).item() == 0.5


@pytest.mark.parametrize(("config", "message"), [
    ({"prediction_type": "v-prediction"}, "v_prediction"),
    ({"prediction_type": "flow"}, "unknown kind"),
    ({"beta_schedule": "scaled-linear"}, "scaled_linear"),
    ({"beta_start": 0.0}, "between 0 and 1"),
    ({"beta_end": 1.5}, "between 0 and 1"),
    ({"num_train_timesteps": 0}, "at least one step"),
    ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps"),
    ({"trained_betas": [0.1, 1.0, 0.2], "num_train_timesteps": 3}, "between 0 and 1"),
    ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, "between 0 and 1"),
    ({"_class_name": "EDMEulerScheduler"}, "EDM"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "EDM"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "above zero"),
    ({"shift": 1.0, "use_dynamic_shifting": True}, "constant shift"),
])
def test_refuses_what_is_no_process(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        process_from_scheduler_config(config)


# --- as an object --------------------------------------------------------------------------------------
def test_is_a_value() -> None:
    process = ddpm()
    process.snr(torch.tensor([3]))
    assert process == ddpm() and hash(process) == hash(ddpm())
    assert replace(process, prediction="v_prediction") == ddpm("v_prediction")
    assert replace(RectifiedFlow(3.0), shift=1.0).times(torch.tensor([0.5]), Uniform()).item() == 0.5


def test_a_table_made_in_inference_mode_serves_training() -> None:
    process = ddpm()
    time = torch.tensor([5, 7, 9, 11])
    x0, noise = batch()
    with torch.inference_mode():
        process.add_noise(x0, noise, time)
    x0.requires_grad_()
    (process.add_noise(x0, noise, time) * 2).sum().backward()
    assert x0.grad is not None


def test_tables_follow_the_times_device() -> None:
    process = ddpm()
    process.snr(torch.tensor([3]))
    time = torch.zeros(4, dtype=torch.long, device="meta")
    x = torch.empty(4, 4, 3, 5, device="meta")
    assert process.add_noise(x, x, time).device.type == "meta"
    assert process.snr(torch.tensor([3])).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu() -> None:
    x0, noise = batch(4, torch.float32)
    for process, time in CASES:
        ours = process.add_noise(x0.cuda(), noise.cuda(), time.cuda())
        close(ours.cpu(), process.add_noise(x0, noise, time))
        close(process.snr(time.cuda()).cpu(), process.snr(time), rtol=1e-5, atol=0)
