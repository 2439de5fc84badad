"""Max-norm: no layer's change grows beyond a limit (Srebro & Shraibman 2005; kohya's scale_weight_norms)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from impasto.deltas.delta import Delta


def norm_of(delta: Delta) -> Tensor:
    """‖dW‖, Frobenius, of a delta that does not look at W: through its factors where these are the smaller thing.

    ‖up · down‖² = Σ (upᵀ · up) ∘ (down · downᵀ), of which both are r × r.
    """
    factors = delta.factors()
    if factors is None or factors[1].shape[0] >= min(delta.shape[0], math.prod(delta.shape[1:])):
        return delta.weight().norm()
    up, down = factors[0].flatten(1), factors[1].flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def limit(delta: Delta, largest: float) -> None:
    """Shrink a delta whose norm is above `largest` to that norm, each of its factors alike.

    Of all kinds dW is a product in which each factor stands once (or a sum of such), hence n factors times
    ratio^(1/n): kohya's square root for two, LyCORIS' for LoKr. One that is small enough stays as it is to the bit.
    """
    import torch

    with torch.no_grad():
        ratio = largest / norm_of(delta).clamp(min=largest)
        factors = list(delta.parameters())
        for factor in factors:
            factor.mul_(ratio ** (1 / len(factors)))
