"""Losses and weights against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from impasto.diffusion import losses
from impasto.diffusion.process import Prediction, Process, RectifiedFlow
from tests.diffusion.processes import CASES, batch, ddpm, levels

close = torch.testing.assert_close
KINDS: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction")
TIME = torch.tensor([0, 100, 500, 900, 999])


def snr_of(process: Process, time: Tensor) -> np.ndarray:
    alpha, sigma = levels(process, time)
    return alpha**2 / sigma**2


def weights(process: Process, time: Tensor, weighting: losses.Weighting,
            gamma: float | None = None) -> np.ndarray:
    weight = losses.weight(process, time, weighting, gamma)
    assert weight.dtype == torch.float32 and weight.shape == time.shape
    return weight.double().numpy()


# --- elements ------------------------------------------------------------------------------------------
def test_elementwise_formulas() -> None:
    prediction, target = batch()
    delta = torch.tensor([1e-3, 0.1, 1.0, 10.0], dtype=torch.float64)
    d, c = prediction - target, delta.reshape(-1, 1, 1, 1)
    close(losses.elementwise(prediction, target, "mse"), d**2)
    close(losses.elementwise(prediction, target, "l1"), d.abs())
    bent = 2 * (torch.sqrt(d**2 + c**2) - c)
    close(losses.elementwise(prediction, target, "huber", delta), c * bent, rtol=1e-9, atol=1e-12)
    close(losses.elementwise(prediction, target, "smooth_l1", delta), bent, rtol=1e-9, atol=1e-12)


def test_huber_lies_between_square_and_absolute() -> None:
    x, zero = torch.tensor([[1e-3]]), torch.zeros(1, 1)
    close(losses.elementwise(x, zero, "huber", torch.tensor([1e3])), x**2)
    close(losses.elementwise(1e6 * x, zero, "smooth_l1", torch.tensor([1e-3])), 2e6 * x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["mse", "l1", "huber", "smooth_l1"])
def test_elementwise_is_single_precision_and_has_a_gradient(kind: losses.Kind) -> None:
    prediction = torch.tensor([[0.5, -2.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = losses.elementwise(prediction, torch.zeros(1, 3), kind, torch.tensor([0.1]))
    assert loss.dtype == torch.float32 and loss.shape == (1, 3)
    loss.sum().backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all()
    assert prediction.grad[0, 0] > 0 > prediction.grad[0, 1]


# --- delta ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("process", "time"), CASES)
def test_delta_schedules(process: Process, time: Tensor) -> None:
    c = 0.1
    alpha, sigma = levels(process, time)
    fraction = (time / 1000 if not isinstance(process, RectifiedFlow) else time).double().numpy()
    expected = {
        "constant": np.full(4, c),
        "exponential": np.exp(math.log(c) * fraction),  # sd-scripts: exp(-alpha t), alpha = -log(c) / T
        "snr": (1 - c) / (1 + sigma / alpha) ** 2 + c,
    }
    for schedule, value in expected.items():
        ours = losses.delta(process, time, c, schedule)
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.double().numpy(), value, rtol=1e-5)


def test_delta_at_pure_noise_is_c() -> None:
    assert losses.delta(ddpm(zero_snr=True), torch.tensor([999]), 0.1, "snr").item() == pytest.approx(0.1)
    ends = losses.delta(RectifiedFlow(), torch.tensor([0.0, 1.0]), 0.1, "snr")
    assert ends.tolist() == pytest.approx([1.0, 0.1])


# --- weights -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr(gamma: float) -> None:
    s = snr_of(ddpm(), TIME)
    clipped = np.minimum(s, gamma)
    for kind, expected in zip(KINDS, (clipped / s, clipped, clipped / (s + 1)), strict=True):
        np.testing.assert_allclose(weights(ddpm(kind), TIME, "min_snr", gamma), expected, rtol=1e-5)


def test_debiased() -> None:
    s = snr_of(ddpm(), TIME)
    for kind, expected in zip(KINDS, (1 / np.sqrt(s), np.sqrt(s), 1 / (s + 1)), strict=True):
        np.testing.assert_allclose(weights(ddpm(kind), TIME, "debiased"), expected, rtol=1e-5)


def test_p2() -> None:
    s = snr_of(ddpm(), TIME)
    np.testing.assert_allclose(weights(ddpm(), TIME, "p2"), 1 / (1 + s), rtol=1e-5)
    np.testing.assert_allclose(weights(ddpm(), TIME, "p2", 0.5), 1 / np.sqrt(1 + s), rtol=1e-5)


def test_gamma_defaults_to_each_papers() -> None:
    np.testing.assert_array_equal(weights(ddpm(), TIME, "min_snr"), weights(ddpm(), TIME, "min_snr", 5.0))
    np.testing.assert_array_equal(weights(ddpm(), TIME, "p2"), weights(ddpm(), TIME, "p2", 1.0))


@pytest.mark.parametrize(("process", "time"), CASES)
def test_none_weighs_all_alike(process: Process, time: Tensor) -> None:
    assert weights(process, time, "none").tolist() == [1.0] * 4


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_a_weighting_means_the_same_whatever_is_predicted(weighting: losses.Weighting) -> None:
    """One error, put as each kind by `convert`: the weighted losses agree."""
    time = TIME[1:]
    x0, noise = batch()
    x_t = ddpm().add_noise(x0, noise, time)
    wrong = torch.zeros_like(x0)
    weighted = []
    for kind in KINDS:
        process = ddpm(kind)
        prediction = process.convert(wrong, x_t, time, "v_prediction", kind)
        each = losses.elementwise(prediction, process.target(x0, noise, time), "mse").mean((1, 2, 3))
        weighted.append(each * losses.weight(process, time, weighting))
    close(weighted[0], weighted[1], rtol=1e-4, atol=0)
    close(weighted[0], weighted[2], rtol=1e-4, atol=0)


def test_min_snr_of_a_flow_weighs_the_same_error_in_x0() -> None:
    process, time = RectifiedFlow(), torch.tensor([0.1, 0.3, 0.5, 0.9])
    x0, noise = batch()
    x_t = process.add_noise(x0, noise, time)
    prediction = torch.zeros_like(x0)
    x0_hat = process.convert(prediction, x_t, time, "flow", "sample")
    of_x0 = (x0_hat - x0).square().mean((1, 2, 3)) * process.snr(time).clamp(max=5)
    of_flow = (prediction - process.target(x0, noise, time)).square().mean((1, 2, 3))
    close(of_flow * losses.weight(process, time, "min_snr"), of_x0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_terminal_snr_keeps_the_last_step(weighting: losses.Weighting, kind: Prediction) -> None:
    """It weighs what the last step weighs without the rescaling."""
    last = torch.tensor([999])
    rescaled, plain = weights(ddpm(kind, zero_snr=True), last, weighting), weights(ddpm(kind), last, weighting)
    assert plain[0] > 0 and rescaled[0] == pytest.approx(plain[0], rel=0.02)


def test_floor_is_stable_diffusions_last_step() -> None:
    last = torch.tensor([999])
    s = snr_of(ddpm(), last)
    assert losses.SNR_FLOOR == pytest.approx(s[0], rel=0.01)
    # and where nothing is rescaled it changes nothing
    np.testing.assert_allclose(weights(ddpm("v_prediction"), last, "min_snr"), s / (s + 1), rtol=1e-5)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased", "p2"])
def test_finite_at_both_ends_of_a_flow(weighting: losses.Weighting) -> None:
    assert np.isfinite(weights(RectifiedFlow(), torch.tensor([0.0, 1.0]), weighting)).all()
