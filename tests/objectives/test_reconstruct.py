"""The reconstruction loss against its formula, and the scale of latents against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from impasto.core.rng import Draws
from impasto.objectives.batch import Batch
from impasto.objectives.reconstruct import Reconstruct, ReconstructOptions, divergence
from tests.families.conftest import random_sd1


def batch(count: int = 2) -> Batch:
    pixels = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(list(range(count)), [str(i) for i in range(count)], torch.ones(count), pixels=pixels)


def test_the_divergence_is_torchs_own() -> None:
    moments = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, logvar = moments.chunk(2, 1)
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()),
                                               torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergence(moments), theirs)


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, 0.5, 1e-3)])
def test_the_loss_is_its_formula(weights: tuple[float, float, float], encoder: bool) -> None:
    """The divergence counts only where something can be done about it."""
    squared, edges, kl = weights
    base, given, draws = random_sd1(), batch(), Draws(0, 0, [0, 1])
    base.layer("vae.encoder" if encoder else "vae.decoder").requires_grad_(True)
    loss = Reconstruct(ReconstructOptions(squared=squared, edges=edges, kl=kl)).loss(base, given, draws)
    vae, kl = base.components["vae"], kl if encoder else 0.0
    assert given.pixels is not None
    for i in range(2):
        x = given.pixels[i:i + 1]
        spread = vae.encode(x).latent_dist
        y = vae.decode(spread.mean + spread.std * draws.normal("latent", (4, 8, 8))[i:i + 1]).sample
        wrong = (y - x)[0].detach().double().numpy()
        expected = np.abs(wrong).mean() + squared * (wrong**2).mean()
        expected += edges * sum(np.abs(np.diff(wrong, axis=axis)).mean() for axis in (1, 2))
        expected += kl * spread.kl().item() / 64
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)


def test_latents_are_scaled_to_a_deviation_of_one() -> None:
    base = random_sd1()
    Reconstruct(ReconstructOptions()).finish(base, [])  # its encoder does not train: nothing is measured
    assert base.config("vae").scaling_factor == 0.18215
    base.components["vae"].requires_grad_(True)
    Reconstruct(ReconstructOptions()).finish(base, [batch(6), batch(6)])
    moments = base.encode_images(batch(6).pixels)
    many = torch.cat([base.latents(moments, torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(i)))
                      for i in range(200)])
    assert many.std().item() == pytest.approx(1, abs=0.01)
