"""The noise process: how pictures turn into noise, and what the network learns to say about it.

Every process here is a line between data and noise, x_t = alpha x_0 + sigma noise, with (alpha, sigma) a
function of the time. Every kind of prediction is a line too, p = a x_0 + b noise:

    kind           a         b        p
    epsilon        0         1        the noise (Ho et al. 2020)
    sample         1         0        the picture x_0
    v_prediction   -sigma    alpha    the velocity (Salimans and Ho 2022, section 4)
    flow           -1        1        noise - x_0 (Liu et al. 2022; Esser et al. 2024)

From x_t and one p, any other p' follows by solving two linear equations: that is `Process.convert`.

Arithmetic is done in at least fp32 and returned so: half precision would round the noise levels. Nothing but
`convert` from a singular kind looks at the values of a tensor, so all of it runs on fake tensors too.
Shapes: B samples, x of any shape (B, ...), time (B,).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from impasto.core.errors import UserError, nearest
from impasto.diffusion import schedules
from impasto.diffusion.densities import Density

#: What a network predicts; diffusers' names, and "flow" for rectified flow.
Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]

#: those that a discrete process is trained for
DDPM_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Process(abc.ABC):
    """x_t = alpha(time) x_0 + sigma(time) noise, and the kind of prediction its network was trained for."""

    prediction: Prediction

    @abc.abstractmethod
    def times(self, u: Tensor, density: Density) -> Tensor:
        """Times (B,) out of uniforms `u` (B,) in [0, 1), by the inverse CDF of `density`."""

    @abc.abstractmethod
    def fraction(self, time: Tensor) -> Tensor:
        """How far a time is on the way from data, 0, to noise, 1: (B,) fp32."""

    @abc.abstractmethod
    def alpha_sigma(self, time: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The factors of data and of noise at `time`, each (B,)."""

    @abc.abstractmethod
    def snr(self, time: Tensor) -> Tensor:
        """The signal-to-noise ratio alpha²/sigma², (B,) fp32; infinite where there is no noise."""

    @property
    @abc.abstractmethod
    def zero_terminal_snr(self) -> bool:
        """Whether the last time is pure noise: there, the noise tells nothing about the picture."""

    @abc.abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """This process in the words of a diffusers scheduler's config."""

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t in one jump from x_0: a sample of q(x_t | x_0) (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self._factors(time, like=x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the network should have said: the prediction of kind `self.prediction`."""
        a, b = _line(self.prediction, *self._factors(time, like=x0))
        return a * x0 + b * noise

    def convert(self, prediction: Tensor, x_t: Tensor, time: Tensor,
                source: Prediction, to: Prediction) -> Tensor:
        """A prediction of kind `source` about `x_t`, put as kind `to`.

        Two lines through the same point (x_0, noise): x_t = alpha x_0 + sigma noise and p = a x_0 + b noise,
        with determinant D = alpha b - sigma a. Then p' = ((a' b - b' a) x_t + D' p) / D.

        D is alpha for epsilon and -sigma for sample. Where it vanishes (epsilon at pure noise, as at the last
        step of zero terminal SNR; sample where there is no noise), `prediction` only repeats `x_t` and any
        answer would be made up: `UserError`. v_prediction and flow are never singular.
        """
        if source == to:
            return prediction
        alpha, sigma = self._factors(time, like=x_t)
        a, b = _line(source, alpha, sigma)
        a_to, b_to = _line(to, alpha, sigma)
        det, det_to = alpha * b - sigma * a, alpha * b_to - sigma * a_to
        if source in self._singular and bool((det == 0).any()):
            where = "pure noise" if source == "epsilon" else "no noise"
            raise UserError(f"at {where}, a prediction of kind {source!r} cannot be turned into {to!r}: "
                            "it only repeats x_t there", fix="use v_prediction, or leave that time out")
        return ((a_to * b - b_to * a) * x_t + det_to * prediction) / det

    @property
    @abc.abstractmethod
    def _singular(self) -> tuple[Prediction, ...]:
        """Kinds that at some time of this process cannot be turned into another."""

    def _factors(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), shaped (B, 1, ...) to multiply `like`, in its precision but at least fp32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        alpha, sigma = self.alpha_sigma(time, dtype)
        return per_sample(alpha, like), per_sample(sigma, like)


@dataclass(frozen=True)
class DDPM(Process):
    """The discrete process of Ho et al. 2020. *time* is a step's index 0 … T-1 (the paper's t - 1), long.

    The fields, and their defaults, are those of diffusers' DDPMScheduler; Stable Diffusion's betas are
    scaled_linear from 0.00085 to 0.012. `trained_betas` replaces the named schedule.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction: Prediction = "epsilon"
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prediction not in DDPM_PREDICTIONS:
            raise UserError(f"unknown kind of prediction {self.prediction!r}", where="prediction_type",
                            fix=nearest(self.prediction, DDPM_PREDICTIONS))
        if self.num_train_timesteps < 1:
            raise UserError("a noise schedule needs at least one step", where="num_train_timesteps")
        if len(self.betas) != self.num_train_timesteps:
            raise UserError(f"{len(self.betas)} trained_betas for {self.num_train_timesteps} steps",
                            where="noise schedule", fix="make num_train_timesteps their number")
        # only the last step may erase everything that the steps before it left
        if not ((self.betas > 0).all() and (self.betas[:-1] < 1).all() and self.betas[-1] <= 1):
            raise UserError("betas must lie between 0 and 1", where="noise schedule",
                            fix="check beta_start, beta_end and trained_betas")

    @cached_property
    def betas(self) -> np.ndarray:
        """(T,) float64: the variance that each step adds."""
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas, dtype=np.float64)
        else:
            betas = schedules.betas(
                self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        return schedules.rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64: alpha² of each step."""
        return np.cumprod(1 - self.betas)

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.betas[-1] == 1)

    @property
    def _singular(self) -> tuple[Prediction, ...]:
        return ("epsilon",) if self.zero_terminal_snr else ()

    def times(self, u: Tensor, density: Density) -> Tensor:
        """Steps t (B,), long: the unit interval of the density in T equal parts."""
        steps = len(self.betas)
        return (density.inverse_cdf(u) * steps).long().clamp(max=steps - 1)

    def fraction(self, time: Tensor) -> Tensor:
        return time.float() / len(self.betas)

    def log_alphas_cumprod(self, time: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """log alphas_cumprod, (B,). All else is computed from it by exp and expm1, without cancellation.

        A fake tensor's table is made anew: it must not outlive the trace.
        """
        if type(time) is not Tensor:
            return self._table(time.device, dtype)[time]
        key = (time.device, dtype)
        if key not in self._tables:
            self._tables[key] = self._table(*key)
        return self._tables[key][time]

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        with np.errstate(divide="ignore"):  # the log of a zero terminal SNR is -inf, as it should be
            logs = np.cumsum(np.log1p(-self.betas))
        return torch.tensor(logs.tolist(), dtype=dtype, device=device)

    def alpha_sigma(self, time: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod)."""
        log = self.log_alphas_cumprod(time, dtype)
        return torch.exp(log / 2), torch.sqrt(-torch.expm1(log))

    def snr(self, time: Tensor) -> Tensor:
        return 1 / torch.expm1(-self.log_alphas_cumprod(time))

    # --- the reverse process -------------------------------------------------------------------------
    def posterior(self, x0: Tensor, x_t: Tensor, time: Tensor,
                  previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and variance (B, 1, ...) of the Gaussian q(x_previous | x_t, x_0).

        Ho et al. 2020, eq. 6 and 7. `previous` (B,) is an earlier step, by default time - 1; -1 is x_0.
        With a stride, beta_t stands for the variance that all the steps in between add together.
        """
        mean, small, _ = self._reverse(x0, x_t, time, time - 1 if previous is None else previous)
        return mean, small

    def ancestral_step(self, prediction: Tensor, x_t: Tensor, time: Tensor, noise: Tensor,
                       previous: Tensor | None = None,
                       variance: Literal["fixed_small", "fixed_large"] = "fixed_small") -> Tensor:
        """One step back, x_previous out of x_t and the network's prediction (Ho et al. 2020, algorithm 2).

        The variance is the posterior's (fixed_small) or beta_t (fixed_large), the two choices of section 3.2;
        the step to x_0 adds no `noise`. `previous` is as in `posterior`.
        """
        previous = time - 1 if previous is None else previous
        x0 = self.convert(prediction, x_t, time, self.prediction, "sample")
        mean, small, large = self._reverse(x0, x_t, time, previous)
        spread = small if variance == "fixed_small" else large
        return mean + per_sample(previous >= 0, x_t) * spread.sqrt() * noise

    def _reverse(self, x0: Tensor, x_t: Tensor, time: Tensor,
                 previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior mean, posterior variance and beta_t of the step from `time` to `previous`."""
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        log = self.log_alphas_cumprod(time, dtype)
        log_previous = torch.where(
            previous >= 0, self.log_alphas_cumprod(previous.clamp(min=0), dtype), 0.0)
        beta = -torch.expm1(log - log_previous)
        noise_left = torch.expm1(log_previous) / torch.expm1(log)  # (1 - acp_previous) / (1 - acp_t)
        of_x0 = torch.exp(log_previous / 2) * beta / -torch.expm1(log)
        of_x_t = torch.exp((log - log_previous) / 2) * noise_left
        mean = per_sample(of_x0, x_t) * x0 + per_sample(of_x_t, x_t) * x_t
        return mean, per_sample(noise_left * beta, x_t), per_sample(beta, x_t)

    # --- diffusers' names ----------------------------------------------------------------------------
    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> DDPM:
        """The process of any discrete diffusers scheduler (DDPM, DDIM, PNDM, Euler, DPM-Solver …).

        Keys about sampling (spacing, clipping, solver order) are none of the process's. A missing key has
        diffusers' default. `UserError` for a process that is not DDPM's.
        """
        if "EDM" in config.get("_class_name", "") or config.get("timestep_type") == "continuous":
            raise UserError("EDM's continuous noise process is not supported", where="scheduler config",
                            fix="use a base of the DDPM or rectified-flow kind")
        names = {f.name for f in fields(cls) if f.init}
        known = {name: value for name, value in config.items() if name in names and name != "prediction"}
        if known.get("trained_betas") is not None:
            known["trained_betas"] = tuple(float(beta) for beta in known["trained_betas"])
        return cls(prediction=config.get("prediction_type", "epsilon"), **known)

    def scheduler_config(self) -> dict[str, Any]:
        """A config for DDPMScheduler; other diffusers schedulers take it by their `from_config`."""
        config: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        config["prediction_type"] = config.pop("prediction")
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        return {"_class_name": "DDPMScheduler", **config}


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """x_s = (1 - s) x_0 + s noise (Liu et al. 2022; Esser et al. 2024, eq. 13). *time* is s in [0, 1], real.

    `shift` moves the times of training and of sampling towards noise, more so the larger the picture
    (Esser et al. 2024, section 5.3.2; Stable Diffusion 3: 3.0 at 1024). Networks in diffusers are told
    s · num_train_timesteps.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    prediction: ClassVar[Prediction] = "flow"
    zero_terminal_snr: ClassVar[bool] = True
    _singular: ClassVar[tuple[Prediction, ...]] = ("epsilon", "sample")

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise UserError(f"the shift of a flow must be above zero, not {self.shift}", where="shift")

    def times(self, u: Tensor, density: Density) -> Tensor:
        """Times s (B,), real: the density's, then shifted."""
        return self.shifted(density.inverse_cdf(u))

    def shifted(self, s: Tensor) -> Tensor:
        """shift · s / (1 + (shift - 1) s): Esser et al. 2024, eq. 23."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def fraction(self, time: Tensor) -> Tensor:
        return time.float()

    def alpha_sigma(self, time: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        time = time.to(dtype)
        return 1 - time, time

    def snr(self, time: Tensor) -> Tensor:
        time = time.float()
        return ((1 - time) / time) ** 2

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> RectifiedFlow:
        """The process of FlowMatchEulerDiscreteScheduler and of solvers told to take flow sigmas."""
        if config.get("use_dynamic_shifting"):
            raise UserError("a shift that depends on each picture's size is not supported",
                            where="scheduler config: use_dynamic_shifting", fix="give a constant shift")
        return cls(shift=config.get("shift", config.get("flow_shift", 1.0)),
                   num_train_timesteps=config.get("num_train_timesteps", 1000))

    def scheduler_config(self) -> dict[str, Any]:
        return {"_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": self.num_train_timesteps, "shift": self.shift}


def resolution_shift(cells: int, base_cells: int) -> float:
    """The shift that gives pictures of `cells` latent cells the noise that suited `base_cells` of them.

    sqrt(m / n): Esser et al. 2024, eq. 23. Multiply by the shift that suited n.
    """
    return (cells / base_cells) ** 0.5


def process_from_scheduler_config(config: Mapping[str, Any]) -> Process:
    """The noise process that a diffusers scheduler's config describes."""
    # a scheduler in memory does not name its class; of those with a "shift", all are flows
    if ("FlowMatch" in config.get("_class_name", "") or "shift" in config
            or config.get("prediction_type") == "flow_prediction"):
        return RectifiedFlow.from_scheduler_config(config)
    return DDPM.from_scheduler_config(config)


def _line(kind: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(a, b) of the prediction a x_0 + b noise."""
    match kind:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1.0, 0.0
        case "v_prediction":
            return -sigma, alpha
        case "flow":
            return -1.0, 1.0
    raise UserError(f"unknown kind of prediction {kind!r}", fix=nearest(kind, get_args(Prediction)))


def per_sample(row: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), to multiply `like` (B, ...)."""
    return row.reshape(-1, *(1 for _ in like.shape[1:]))
