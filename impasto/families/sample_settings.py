"""How pictures are drawn, as one asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from impasto.core.errors import UserError
from impasto.families.schedulers import canonical


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn. Raises `UserError` for what makes no sense."""

    #: of the solver
    steps: int = 30
    #: classifier-free guidance (Ho and Salimans 2022, as 1 + w); 1 or less: none, and no negative prompt
    guidance: float = 7.5
    #: a name of `schedulers.SCHEDULERS`, or of a diffusers class
    scheduler: str = "dpm++2m"
    #: pixels, multiples of the base's latent cell
    width: int = 512
    height: int = 512
    #: with initial pictures: how much of the way is drawn anew, 1 is all of it (diffusers' img2img)
    strength: float = 0.75
    #: of bases that edit pictures: guidance by the picture (Brooks et al. 2023, eq. 3; 1.5 is diffusers'); 1: none
    image_guidance: float = 1.5
    #: with a refiner: the share of the noise levels, from the noisiest, after which it takes over (diffusers'
    #: `denoising_end`; Podell et al. 2023, section 2.5, have 0.8)
    handover: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler", canonical(self.scheduler))
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must lie above 0, up to 1, not {self.strength}")
        if not 0 < self.handover < 1:
            raise UserError(f"handover must lie between 0 and 1, not {self.handover}")


def check_size(grid: int, width: int, height: int) -> None:
    """That a base of that grid can draw a picture of that size. Raises `UserError`."""
    for name, pixels in (("width", width), ("height", height)):
        if pixels < grid or pixels % grid:
            near = max(round(pixels / grid), 1) * grid
            raise UserError(f"{name} {pixels} is not a multiple of {grid} pixels", fix=f"take {near}")
