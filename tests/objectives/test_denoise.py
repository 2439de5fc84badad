"""The denoising loss against its formula, written out sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.rng import Draws, generator
from impasto.diffusion import densities
from impasto.diffusion.process import process_from_scheduler_config
from impasto.objectives import OBJECTIVES
from impasto.objectives.batch import Batch
from impasto.objectives.denoise import Denoise, DenoiseOptions
from tests.families.conftest import random_sd3

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
B, C, H, W = 3, 4, 8, 8


class Stub:
    """A base whose network says 0.3·x_t + 0.1·t/1000 + the caption's number, and whose latents are scaled by 0.5."""

    def __init__(self, prediction: str = "epsilon") -> None:
        self.process = process_from_scheduler_config({**SD, "prediction_type": prediction})

    def encode_text(self, captions: Any) -> dict[str, Tensor]:
        return {"states": torch.tensor([float(len(c)) for c in captions])}

    encode_negatives = encode_text

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean(1, keepdim=True).expand(-1, C, -1, -1)] * 2, 1)[..., ::8, ::8]

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = moments.chunk(2, 1)
        return 0.5 * (mean + (0.5 * logvar).exp() * noise)

    def seen(self, extras: Any, normal: Any) -> Any:
        return extras

    def condition(self, text: dict[str, Tensor], geometry: Any = None, extras: Any = None) -> Tensor:
        return text["states"]

    def predict(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return 0.3 * latents + (0.1 * time / 1000 + condition).view(-1, 1, 1, 1)


def batch(**changes: Any) -> Batch:
    torch.manual_seed(0)
    filled: dict[str, Any] = dict(
        samples=[0, 1, 2], names=["a", "b", "c"], weight=torch.ones(B), moments=torch.randn(B, 2 * C, H, W),
        text={"states": torch.tensor([0.0, 0.5, 1.0])})
    return Batch(**{**filled, **changes})


def loss(options: dict[str, Any], base: Stub, given: Batch, step: int = 7) -> Tensor:
    return Denoise(DenoiseOptions(**options)).loss(base, given, Draws(0, step, given.samples))  # type: ignore[arg-type]


def by_hand(given: Batch, sample: int, step: int = 7, prediction: str = "epsilon") -> tuple[Tensor, Tensor, int, float]:
    """Prediction and target of one sample, its time, and its signal-to-noise ratio, in float64 from the formulas."""
    def normal(use: str) -> Tensor:
        return torch.randn(C, H, W, generator=generator(0, step, sample, use)).double()

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    u = torch.rand((), generator=generator(0, step, sample, "time")).item()
    t = int(u * 1000)
    a = torch.prod(1 - betas[: t + 1])
    mean, logvar = given.moments[sample].double().chunk(2)  # type: ignore[index]
    x0, noise = 0.5 * (mean + (0.5 * logvar).exp() * normal("latent")), normal("noise")
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    said = 0.3 * x_t + 0.1 * t / 1000 + given.text["states"][sample]  # type: ignore[index]
    target = {"epsilon": noise, "sample": x0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0}[prediction]
    return said, target, t, (a / (1 - a)).item()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_mean_squared_error_of_the_target(prediction: str) -> None:
    given = batch()
    got = loss({}, Stub(prediction), given)
    for sample in range(B):
        said, target, _, _ = by_hand(given, sample, prediction=prediction)
        assert got[sample].item() == pytest.approx((said - target).square().mean().item(), rel=1e-5)


def test_min_snr_weighs_by_the_paper() -> None:
    given = batch()
    plain, weighed = loss({}, Stub(), given), loss({"weighting": "min_snr", "gamma": 5}, Stub(), given)
    for sample in range(B):
        snr = by_hand(given, sample)[3]
        assert (weighed / plain)[sample].item() == pytest.approx(min(snr, 5) / snr, rel=1e-4)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    given = batch()
    whole = loss({"pyramid_discount": 0.3, "noise_offset": 0.1, "input_perturbation": 0.1}, Stub(), given)
    for i in range(B):
        alone = batch(samples=[i], names=["x"], weight=torch.ones(1), moments=given.moments[i:i + 1],
                      text={"states": given.text["states"][i:i + 1]})
        single = loss({"pyramid_discount": 0.3, "noise_offset": 0.1, "input_perturbation": 0.1}, Stub(), alone)
        assert single.item() == pytest.approx(whole[i].item(), rel=1e-6)


def test_a_mask_multiplies_each_cell() -> None:
    given = batch()
    mask = torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(1))
    got = loss({}, Stub(), batch(mask=mask))
    for sample in range(B):
        said, target, _, _ = by_hand(given, sample)
        expected = ((said - target).square() * mask[sample].double()).sum().item() / (C * H * W)
        assert got[sample].item() == pytest.approx(expected, rel=1e-5)


def test_nothing_is_learned_outside_a_mask() -> None:
    class Learning(Stub):
        bias = torch.zeros(B, C, H, W, requires_grad=True)

        def predict(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            return super().predict(latents, time, condition) + self.bias

    mask = torch.zeros(B, 1, H, W)
    mask[..., 2:5, :4] = 1
    loss({}, base := Learning(), batch(mask=mask)).sum().backward()
    assert base.bias.grad is not None
    inside = mask.expand(-1, C, -1, -1).bool()
    assert base.bias.grad[inside].all() and not base.bias.grad[~inside].any()


def test_pixels_and_captions_are_encoded_in_the_step() -> None:
    pixels = torch.rand(B, 3, 8 * H, 8 * W)
    base = Stub()
    encoded = batch(moments=base.encode_images(pixels), text=base.encode_text(["", "a", "bb"]))
    given = batch(moments=None, pixels=pixels, text=None, captions=["", "a", "bb"])
    assert torch.equal(loss({}, base, given), loss({}, base, encoded))


def test_a_range_of_times_is_kept_to() -> None:
    options = DenoiseOptions(times_range=(0.2, 0.4), times="logit_normal")
    times = Stub().process.times(torch.linspace(0, 0.999, 200), options.density())
    assert times.min() >= 200 and times.max() < 400
    with pytest.raises(ValueError, match="times_range"):
        DenoiseOptions(times_range=(0.4, 0.2))


def test_times_are_those_that_the_base_was_trained_with() -> None:
    """A rectified flow's are logit-normal, moved by its shift (Esser et al. 2024, section 3.1; diffusers' scripts)."""
    assert isinstance(DenoiseOptions().density(), densities.Uniform)
    assert DenoiseOptions().density(flow=True) == densities.LogitNormal(0.0, 1.0)
    assert isinstance(DenoiseOptions(times="uniform").density(flow=True), densities.Uniform)
    base = random_sd3(t5=False)
    drawn = Draws(0, 0, list(range(500)))
    noisy = Denoise(DenoiseOptions()).noisy(base, torch.zeros(500, 16, 2, 2), drawn)
    s = torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * drawn.uniform("time") - 1))
    torch.testing.assert_close(noisy.time, 3 * s / (1 + 2 * s))


def test_an_unknown_objective_names_the_known() -> None:
    with pytest.raises(UserError, match="unknown objective 'denoize'; did you mean 'denoise'"):
        OBJECTIVES.get("denoize")
