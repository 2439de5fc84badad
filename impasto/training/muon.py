"""Muon: momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024).

Each update has the singular directions of the momentum, all at the same strength, so that what is rare in the
gradient is learned as fast as what is common. A convolution counts as the matrix (out, in · kernel); vectors are left
to AdamW. Updates are scaled to AdamW's usual size, 0.2 · √max(rows, columns) (Liu et al. 2025, arXiv:2502.16982), so
that one learning rate serves both.

torch's own Muon takes no convolutions, and computes in bfloat16, which few CPUs have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Newton–Schulz coefficients of Jordan et al., whose five rounds bring singular values into about 0.7 … 1.2
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices, AdamW for what is none."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float = 1e-3, momentum: float = 0.95,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01) -> None:
        super().__init__(groups, dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = _matrix if parameter.ndim > 1 and min(parameter.flatten(1).shape) > 1 else _vector
                    update(parameter, parameter.grad, self.state[parameter], group)


def _matrix(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["momentum"] = torch.zeros_like(parameter)
    state["momentum"].lerp_(gradient, 1 - group["momentum"])
    direction = orthogonal(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))
    size = 0.2 * max(direction.shape) ** 0.5
    parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * size)


def _vector(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW (Kingma & Ba 2015, algorithm 1), the decay being done."""
    if not state:
        state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
    state["step"] += 1
    first, second = group["betas"]
    state["mean"].lerp_(gradient, 1 - first)
    state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    parameter.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - first ** state["step"]))


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """U Vᵀ of a matrix U S Vᵀ, roughly: singular values in about 0.7 … 1.2.

    Newton–Schulz rounds X ← (a + b XXᵀ + c (XXᵀ)²) X. Each round's factor is a polynomial of the first XXᵀ, so that for
    a long matrix the rounds go on those square ones, and it is multiplied twice in all.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    factor = _polynomial(gram)
    if x.shape[1] < 2 * x.shape[0]:
        for _ in range(rounds - 1):
            x = factor @ x
            factor = _polynomial(x @ x.T)
    else:
        product = factor
        for _ in range(rounds - 1):
            gram = factor @ gram @ factor
            factor = _polynomial(gram)
            product = factor @ product
        factor = product
    x = factor @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _polynomial(gram: Tensor) -> Tensor:
    """a + b G + c G² of a square matrix."""
    a, b, c = _COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
