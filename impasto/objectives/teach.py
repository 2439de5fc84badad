"""Preservation without class pictures: the frozen base's own prediction on the class caption is the target.

To the denoising loss is added the squared difference between what the network says now and what the base alone says,
of the batch's own noisy pictures under the class caption: learning without forgetting (Li & Hoiem 2016,
arXiv:1606.09282), with the base as its own teacher. DreamBooth's class pictures (Ruiz et al. 2022, eq. 2) ask for the
same with pictures that the base has drawn; here none is drawn, at the cost of a forward pass without gradients, and
of a second sample in the one with them. What is kept is what the base says near the pictures at hand, not near others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from impasto.objectives.base import Alone
from impasto.objectives.denoise import Denoise, NoiseOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from impasto.core.rng import Draws
    from impasto.families.base import Base, Geometry, TextStates
    from impasto.objectives.batch import Batch


class TeachOptions(NoiseOptions):
    """`[objective] kind = "teach"`."""

    kind: Literal["teach"] = "teach"
    caption: Annotated[list[str], Field(min_length=1)] = Field(
        description='What is to stay as the base has it: "a photo of a dog", or several such captions, one of which is '
        "taken in each use.")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="Of the squared difference from the base's "
                          "prediction, beside 1 for the pictures (as DreamBooth's lambda for class pictures).")

    @field_validator("caption", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class Teach(Denoise):
    """The denoising loss, and the squared difference from the frozen base's prediction on the class caption."""

    Options: ClassVar[type[NoiseOptions]] = TeachOptions
    needs_teacher = True

    def meet(self, base: Base, alone: Alone, trains: frozenset[str]) -> None:
        """Encode the class captions with the base alone, once. A student whose text encoder trains has its own states,
        in each step."""
        import torch

        options: TeachOptions = self.options
        self.alone, self.changing = alone, bool(trains & set(base.text_encoder_names))
        with alone(), torch.no_grad():  # one by one: the composition of a batch changes the last bits
            self.states: list[TextStates] = [base.encode_text([caption]) for caption in options.caption]

    def loss(self, base: Base, batch: Batch, draws: Draws) -> Tensor:
        """Per-sample losses (B,), fp32: as `Denoise.loss`, plus weight times the mean squared difference over the whole
        picture, whatever its mask; both parts weighted alike by noise level, and then by the picture's own weight."""
        import torch

        options: TeachOptions = self.options
        if not options.weight:
            return super().loss(base, batch, draws)
        latents = self.latents(base, batch, draws)
        text = self.text(base, batch)
        chosen = [int(place * len(options.caption)) for place in draws.uniform("class caption").tolist()]
        taught = self._stacked(base, chosen, latents.device)
        own = base.encode_text([options.caption[i] for i in chosen]) if self.changing else taught
        noisy, extras = self.noisy(base, latents, draws), base.seen(batch.extras, draws.normal)
        # the student goes first: autocast keeps the casts of weights, and those made without gradients have none
        pictures, of_class = base.predict(
            torch.cat([noisy.x_t] * 2), torch.cat([noisy.time] * 2),
            base.condition(base.stack_text([text, own]), _twice(batch.geometry),
                           {name: torch.cat([extra] * 2) for name, extra in extras.items()})).chunk(2)
        with self.alone(), torch.no_grad():
            target = base.predict(noisy.x_t, noisy.time, base.condition(taught, batch.geometry, extras))
        wide = torch.promote_types(of_class.dtype, torch.float32)
        apart = (of_class.to(wide) - target.to(wide)).square().flatten(1).mean(1) * noisy.weight
        return self.compared(base, pictures, noisy, batch) + options.weight * apart

    def _stacked(self, base: Base, chosen: Sequence[int], device: torch.device) -> TextStates:
        """The teacher's states of those captions, as a batch."""
        return {name: state.to(device) for name, state in base.stack_text([self.states[i] for i in chosen]).items()}


def _twice(geometry: Geometry | None) -> Geometry | None:
    """That of the same pictures twice over."""
    import torch

    from impasto.families.base import Geometry

    if geometry is None:
        return None
    return Geometry(*(torch.cat([given] * 2) for given in (geometry.original, geometry.crop, geometry.target)))
