"""Pictures through the VAE and back: what its encoder and decoder are trained on.

L1 on pixels, L1 on their differences from neighbour to neighbour (edges), and a weak pull of the latents towards a
standard normal (Kingma & Welling 2014; Rombach et al. 2022 weigh it 1e-6). No downloaded perceptual network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from impasto.core.rng import Draws
from impasto.families.base import Base
from impasto.objectives.base import Objective, ObjectiveOptions
from impasto.objectives.batch import Batch


class ReconstructOptions(ObjectiveOptions):
    """`[objective] kind = "reconstruct"`."""

    kind: Literal["reconstruct"] = "reconstruct"
    squared: float = Field(1.0, ge=0, description="Weight of the squared error beside 1 for L1.")
    edges: float = Field(0.5, ge=0, description="Weight of L1 between neighbours' differences.")
    kl: float = Field(1e-6, ge=0, description="Weight of the latents' divergence from a standard normal, nats summed "
                      "over a picture's latents, divided by its cells (LDM: 1e-6); off where the encoder is not "
                      "trained.")


class Reconstruct(Objective):
    """The reconstruction loss of a VAE."""

    Options = ReconstructOptions
    reads = frozenset({"pictures"})

    def loss(self, base: Base, batch: Batch, draws: Draws) -> Tensor:
        """Per-sample losses (B,), fp32."""
        assert batch.pixels is not None, "a VAE that trains is given pixels"
        options: ReconstructOptions = self.options
        moments = base.encode_images(batch.pixels).float()
        cells = (moments.shape[1] // 2, *moments.shape[2:])
        latents = base.latents(moments, draws.normal("latent", cells))
        wrong = base.decode_latents(latents).float() - batch.pixels
        loss = _mean(wrong.abs()) + options.squared * _mean(wrong.square())
        if options.edges:
            across, down = wrong[..., 1:] - wrong[..., :-1], wrong[..., 1:, :] - wrong[..., :-1, :]
            loss = loss + options.edges * (_mean(across.abs()) + _mean(down.abs()))
        if options.kl and _encoder_trains(base):
            loss = loss + options.kl * divergence(moments) / (cells[1] * cells[2])
        return loss

    def finish(self, base: Base, batches: Iterable[Batch]) -> None:
        """Scale the latents to a standard deviation of 1, as measured (Rombach et al. 2022, appendix G).

        Where the encoder is not trained, its latents keep the scale that others know.
        """
        if not _encoder_trains(base):
            return
        total, squares, count = 0.0, 0.0, 0
        with torch.no_grad():
            for batch in batches:
                assert batch.pixels is not None
                mean, logvar = base.encode_images(batch.pixels).double().chunk(2, dim=1)
                total += mean.sum().item()
                squares += (mean.square() + logvar.exp()).sum().item()  # the draw's variance counts too
                count += mean.numel()
        deviation = (squares / count - (total / count) ** 2) ** 0.5
        base.set_latent_scale(1 / deviation)


def divergence(moments: Tensor) -> Tensor:
    """KL of N(mean, variance) from N(0, 1), (B,), summed over latents: Kingma & Welling 2014, appendix B."""
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def _encoder_trains(base: Base) -> bool:
    """Whether anything upstream of the latents is trained; else their divergence is a constant."""
    return any(parameter.requires_grad for path, parameter in base.components["vae"].named_parameters()
               if path.startswith(("encoder.", "quant_conv.")))


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
