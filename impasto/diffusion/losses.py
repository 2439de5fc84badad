"""The loss of each element, and what each sample's loss weighs by its noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from impasto.diffusion.kinds import DeltaSchedule, Kind, Weighting
from impasto.diffusion.process import Prediction, Process, per_sample

#: The signal-to-noise ratio of Stable Diffusion's last step. Under zero terminal SNR no weight takes a step
#: to be noisier: min-SNR's v form would weigh the last step zero, the very one that the rescaling is for.
SNR_FLOOR = 0.0047


def elementwise(prediction: Tensor, target: Tensor, kind: Kind, delta: Tensor | None = None) -> Tensor:
    """The loss of each element (B, ...), in at least fp32.

    huber is 2δ(√(d² + δ²) - δ), near d² for d below δ and 2δ|d| above; smooth_l1 is the same over δ. Both are
    smooth everywhere ("pseudo-Huber", as in sd-scripts) and need `delta` (B,).
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    d = prediction.to(dtype) - target.to(dtype)
    match kind:
        case "mse":
            return d**2
        case "l1":
            return d.abs()
    assert delta is not None, f"{kind} needs a delta"
    c = per_sample(delta, d)
    bent = 2 * d**2 / ((d**2 + c**2).sqrt() + c)  # = 2(√(d² + δ²) - δ), without cancellation
    return c * bent if kind == "huber" else bent


def delta(process: Process, time: Tensor, c: float, schedule: DeltaSchedule) -> Tensor:
    """δ of each sample (B,), fp32: the noisier, the more forgiving (Khrapov et al. 2024; sd-scripts).

    constant: c. exponential: from 1 at data to c at noise, as c^t. snr: the same ends, as
    (1 - c)/(1 + sigma/alpha)² + c.
    """
    match schedule:
        case "constant":
            return torch.full(time.shape, c, dtype=torch.float32, device=time.device)
        case "exponential":
            return c ** process.fraction(time)
        case "snr":
            alpha, sigma = process.alpha_sigma(time)
            return (1 - c) * (alpha / (alpha + sigma)) ** 2 + c


def weight(process: Process, time: Tensor, weighting: Weighting, gamma: float | None = None) -> Tensor:
    """What each sample's loss weighs (B,), fp32. S is the signal-to-noise ratio.

    A weighting is a weight of the squared error in x_0. Divided by `in_x0`, it means the same whatever the
    network predicts.

    min_snr: min(S, γ), γ = 5, so min(S, γ)/S for epsilon, min(S, γ)/(S + 1) for v (Hang et al. 2023).
    debiased: √S, so 1/√S for epsilon (Yu et al. 2023); for v it is sd-scripts' 1/(S + 1) instead.
    p2: S/(1 + S)^γ, γ = 1, so 1/(1 + S)^γ for epsilon (Choi et al. 2022, with k = 1).

    Where S may be zero, it counts as at least `SNR_FLOOR`; where there is no noise, as finite.
    """
    if weighting == "none":
        return torch.ones(time.shape, dtype=torch.float32, device=time.device)
    snr = process.snr(time).clamp(min=SNR_FLOOR if process.zero_terminal_snr else 0.0, max=1e8)
    match weighting:
        case "min_snr":
            of_x0 = snr.clamp(max=5.0 if gamma is None else gamma)
        case "debiased":
            of_x0 = torch.ones_like(snr) if process.prediction == "v_prediction" else snr.sqrt()
        case "p2":
            of_x0 = snr / (1 + snr) ** (1.0 if gamma is None else gamma)
    return of_x0 / in_x0(process.prediction, snr)


def in_x0(kind: Prediction, snr: Tensor) -> Tensor:
    """How many times larger the squared error of a prediction is than the squared error in x_0 that it means.

    (D / sigma)², D the determinant in `Process.convert`.
    """
    match kind:
        case "sample":
            return torch.ones_like(snr)
        case "epsilon":
            return snr
        case "v_prediction":
            return snr + 1
        case "flow":
            return (1 + snr.sqrt()) ** 2
