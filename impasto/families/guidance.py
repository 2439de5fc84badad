"""Classifier-free guidance: for which conditions a denoiser is asked, and how what it says is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from impasto.families.base import Caption


@dataclass(frozen=True)
class Guidance:
    """How far predictions go beyond those without prompt, and without the picture to edit."""

    text: float  # 1 or less: none
    picture: float | None = None  # of a base that edits pictures, likewise; None: of others

    @property
    def ways(self) -> int:
        """For how many conditions each step asks: 1, 2 (Ho and Salimans 2022) or 3 (Brooks et al. 2023)."""
        if self.text <= 1 and (self.picture is None or self.picture <= 1):
            return 1
        return 2 if self.picture is None else 3

    def negatives(self, negatives: Sequence[Caption]) -> list[Caption]:
        """Those of all conditions but the last, one after another; the last has the prompts."""
        return [*negatives] * (self.ways - 1)

    def extras(self, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is shown, of all conditions: the first of three lacks the picture too."""
        if self.ways == 3:
            return {name: torch.cat([torch.zeros_like(one), one, one]) for name, one in extras.items()}
        return {name: torch.cat([one] * self.ways) for name, one in extras.items()}

    def joined(self, prediction: Tensor) -> Tensor:
        """One prediction out of those for all conditions."""
        if self.ways == 1:
            return prediction
        if self.ways == 2:
            without, with_ = prediction.chunk(2)
            return without + self.text * (with_ - without)  # Ho and Salimans 2022, eq. 6, as 1 + w
        assert self.picture is not None
        neither, picture, both = prediction.chunk(3)  # Brooks et al. 2023, eq. 3
        return neither + self.picture * (picture - neither) + self.text * (both - picture)
