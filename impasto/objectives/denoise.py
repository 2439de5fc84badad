"""The default objective: noise the latents, predict, compare with the target.

Ho et al. 2020, eq. 14, in latent space (Rombach et al. 2022, eq. 2), for whatever the process predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from impasto.diffusion.kinds import DeltaSchedule, Kind, Weighting
from impasto.objectives.base import Objective, ObjectiveOptions

if TYPE_CHECKING:
    from torch import Tensor

    from impasto.core.rng import Draws
    from impasto.diffusion import densities
    from impasto.families.base import Base, TextStates
    from impasto.objectives.batch import Batch


class NoiseOptions(ObjectiveOptions):
    """The keys of every objective that noises latents and looks at the prediction."""

    loss: Kind = Field("mse", description="What is taken of each element's difference.")
    huber_c: float = Field(0.1, gt=0, description="Where huber and smooth_l1 turn straight (sd-scripts: 0.1).")
    huber_schedule: DeltaSchedule = Field("snr", description="How it moves with noise (sd-scripts: snr).")
    weighting: Weighting = Field("none", description="Of a sample's loss by its noise level. min_snr helps full "
                                        "fine-tuning on large sets and does little on small ones (diffusers).")
    gamma: float | None = Field(None, gt=0, description="Of min_snr (default 5, Hang et al. 2023) and p2 (default 1, "
                                "Choi et al. 2022).")
    times: Literal["auto", "uniform", "logit_normal", "cosmap", "mode"] = Field(
        "auto", description="How often each noise level is trained. auto: as the base was trained, all alike, or of a "
        "rectified flow (SD 3) logit_normal, moved by the shift of its scheduler (3), as in diffusers.")
    times_mean: float = Field(0.0, description="Of logit_normal.")
    times_std: float = Field(1.0, gt=0, description="Of logit_normal.")
    mode_scale: float = Field(1.29, description="Of mode (Esser et al. 2024).")
    times_range: tuple[float, float] = Field((0.0, 1.0), description="The part of the process that is trained, "
                                             "0 without noise, 1 pure noise.")
    noise_offset: float = Field(0.0, ge=0, description="Shift of whole channels, for very dark or bright pictures: "
                                "0 is off; 0.05 is the SDXL report's, 0.0357 kohya's suggestion.")
    pyramid_discount: float = Field(0.0, ge=0, lt=1, description="Multi-resolution noise: 0 is off (Whitaker: 0.9; "
                                    "kohya suggests 0.1 … 0.3 for fine-tunes).")
    input_perturbation: float = Field(0.0, ge=0, description="0 is off (Ning et al. 2023: 0.1).")

    @model_validator(mode="after")
    def _range_is_one(self) -> Self:
        low, high = self.times_range
        if not 0 <= low < high <= 1:
            raise ValueError("times_range must be two numbers, 0 <= low < high <= 1")
        return self

    def density(self, flow: bool = False) -> densities.Density:
        """The density of times that these keys describe, of a rectified flow or not."""
        from impasto.diffusion import densities

        usual = "logit_normal" if flow else "uniform"
        density: densities.Density = {
            "uniform": densities.Uniform(),
            "logit_normal": densities.LogitNormal(self.times_mean, self.times_std),
            "cosmap": densities.CosMap(),
            "mode": densities.Mode(self.mode_scale),
        }[usual if self.times == "auto" else self.times]
        return density if self.times_range == (0.0, 1.0) else densities.Range(*self.times_range, density)


class DenoiseOptions(NoiseOptions):
    """`[objective] kind = "denoise"`."""

    kind: Literal["denoise"] = "denoise"


@dataclass(frozen=True)
class Noisy:
    """Latents on their way through the process."""

    x_t: Tensor  # (B, C, h, w) what the network sees
    time: Tensor  # (B,)
    target: Tensor  # (B, C, h, w) what it is to predict
    weight: Tensor  # (B,) of each sample's loss, by its noise level


class Denoise(Objective):
    """The denoising loss."""

    Options: ClassVar[type[NoiseOptions]] = DenoiseOptions
    reads = frozenset({"pictures", "captions", "masks", "extras"})

    def loss(self, base: Base, batch: Batch, draws: Draws) -> Tensor:
        """Per-sample losses (B,), fp32, each a mean over latent cells (times `batch.mask`, where there is one)."""
        latents = self.latents(base, batch, draws)
        text = self.text(base, batch)
        noisy = self.noisy(base, latents, draws)
        told = base.condition(text, batch.geometry, base.seen(batch.extras, draws.normal))
        prediction = base.predict(noisy.x_t, noisy.time, told)
        return self.compared(base, prediction, noisy, batch)

    def noisy(self, base: Base, latents: Tensor, draws: Draws) -> Noisy:
        """Noise this step's latents (B, C, h, w)."""
        from impasto.diffusion import losses, noise

        options: NoiseOptions = self.options
        target_noise = noise.gaussian(draws, tuple(latents.shape[1:]))
        if options.noise_offset:
            target_noise = noise.add_offset(target_noise, draws, options.noise_offset)
        if options.pyramid_discount:
            target_noise = noise.add_pyramid(target_noise, draws, options.pyramid_discount)
        seen_noise = noise.perturb(target_noise, draws, options.input_perturbation) if options.input_perturbation \
            else target_noise
        process = base.process
        time = process.times(draws.uniform("time"), options.density(process.prediction == "flow"))
        return Noisy(process.add_noise(latents, seen_noise, time), time, process.target(latents, target_noise, time),
                     losses.weight(process, time, options.weighting, options.gamma))

    def compared(self, base: Base, prediction: Tensor, noisy: Noisy, batch: Batch) -> Tensor:
        """Per-sample losses (B,), fp32, of a prediction."""
        from impasto.diffusion import losses

        options: NoiseOptions = self.options
        delta = None if options.loss in ("mse", "l1") else \
            losses.delta(base.process, noisy.time, options.huber_c, options.huber_schedule)
        each = losses.elementwise(prediction, noisy.target, options.loss, delta)
        if batch.mask is not None:
            each = each * batch.mask
        return each.mean(dim=tuple(range(1, each.ndim))) * noisy.weight

    @staticmethod
    def text(base: Base, batch: Batch) -> TextStates:
        """The captions' states, cached or encoded here."""
        return batch.text if batch.text is not None else base.encode_negatives(batch.captions or [])

    @staticmethod
    def latents(base: Base, batch: Batch, draws: Draws) -> Tensor:
        """This step's sample of the latents, fp32: from cached moments, or encoded here where the VAE trains."""
        moments = batch.moments if batch.moments is not None else base.encode_images(_given(batch.pixels))
        cells = (moments.shape[1] // 2, *moments.shape[2:])
        return base.latents(moments, draws.normal("latent", cells)).float()


def _given(pixels: Tensor | None) -> Tensor:
    assert pixels is not None, "a batch has moments or pixels"
    return pixels
