"""Optimizer steps inside the backward: each gradient is used as soon as it is whole, and let go at once.

Of a network that trains whole, the gradients take as much memory as its weights. Here no two of them need be there
together (LOMO: Lv et al. 2023, arXiv:2306.09782; kohya's fused_backward_pass). The steps of an optimizer that looks at
each weight by itself are the same, to the bit. What looks at all gradients before any step is taken cannot be: their
norm as a bound, a sum over several backwards or processes, the scale of a loss in fp16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from impasto.training.rounding import Steps


class FusedBackward:
    """Takes the steps of parameters whenever a backward has made one's gradient."""

    def __init__(self, steps: Steps, parameters: Iterable[nn.Parameter]) -> None:
        self.steps = steps
        self._handles = [parameter.register_post_accumulate_grad_hook(self.ready) for parameter in parameters]
        self.begin(0)

    def begin(self, step: int, resting: Iterable[nn.Parameter] = ()) -> None:
        """What follows is the backward of optimizer step `step` (from 0), in which some parameters rest."""
        self.step, self._resting = step, set(resting)
        self._norms: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def ready(self, parameter: nn.Parameter) -> None:
        """Take the step of one whose gradient is whole."""
        gradient = parameter.grad
        assert gradient is not None
        self._norms[parameter] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        if parameter not in self._resting:
            self.steps.one(parameter, self.step)
        parameter.grad = None

    def norm(self) -> Tensor:
        """The norm of all gradients of the step, fp32."""
        return torch.linalg.vector_norm(torch.stack([*self._norms.values()])) if self._norms else torch.zeros(())

    def had(self) -> Collection[nn.Parameter]:
        """The parameters whose gradient was not all zeros."""
        return {parameter for parameter, norm in self._norms.items() if bool(norm)}
