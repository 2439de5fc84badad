"""Densities of training times on [0, 1], each given by the inverse of its CDF.

A time is thus a pure function of one uniform number per sample. 0 is data, 1 is noise; a `Process` turns the
result into its own kind of time. Esser et al. 2024, section 3.1, unless said otherwise.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from impasto.core.errors import UserError


class Density(abc.ABC):
    """A distribution of times over [0, 1]."""

    @abc.abstractmethod
    def inverse_cdf(self, u: Tensor) -> Tensor:
        """Times in [0, 1] out of uniforms `u` in [0, 1), of any shape. Never decreases."""


@dataclass(frozen=True)
class Uniform(Density):
    """Every time alike, as DDPM was trained (Ho et al. 2020, algorithm 1)."""

    def inverse_cdf(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal(Density):
    """logit(t) is normal, so that middle times come more often (eq. 19); a `mean` above 0 leans to noise."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UserError(f"the std of a logit-normal density must be above zero, not {self.std}")

    def inverse_cdf(self, u: Tensor) -> Tensor:
        # erfinv, not ndtri: Apple's GPUs have it too. 2u - 1 is exact for u out of torch.rand
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return torch.sigmoid(self.mean + self.std * normal)


@dataclass(frozen=True)
class Mode(Density):
    """Middle times more often for a `scale` above 0, the ends for one below (eq. 20; the paper's best: 1.29).

    The paper's 1 - u - scale (cos²(πu/2) - 1 + u) falls as u grows; this is the same with 1 - u for u. It is
    monotone, hence an inverse CDF, for scales from -1 to 2/(π - 2).
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"the scale of a mode density must lie between -1 and {2 / (math.pi - 2):.4f}, "
                            f"not {self.scale}")

    def inverse_cdf(self, u: Tensor) -> Tensor:
        return u - self.scale * (torch.sin(math.pi / 2 * u) ** 2 - u)


@dataclass(frozen=True)
class CosMap(Density):
    """2 / (π - 2πt + 2πt²): on a straight line, the noise levels of the cosine schedule (eq. 21)."""

    def inverse_cdf(self, u: Tensor) -> Tensor:
        # the paper's 1 - 1 / (tan(πu/2) + 1), without its pole at u = 1
        sin, cos = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return sin / (sin + cos)


@dataclass(frozen=True)
class Range(Density):
    """Another density squeezed into `low` to `high`: only these noise levels are trained.

    OneTrainer's min and max noising strength; sd-scripts' min_timestep and max_timestep, over T.
    """

    low: float
    high: float
    inner: Density = Uniform()

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"a range of times needs 0 <= low < high <= 1, not {self.low} and {self.high}")

    def inverse_cdf(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.inner.inverse_cdf(u)
