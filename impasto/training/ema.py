"""The exponential moving average of trained weights: smoother than any of the states that it averages.

Kept beside the weights in fp32, part of every checkpoint; previews and artifacts show it. Early in a run the decay
is lower, (1 + step) / (10 + step), so that the random start is forgotten (diffusers' EMAModel, TensorFlow's practice).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of some parameters. A decay of 0 averages nothing and costs nothing."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.averages = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters] \
            if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step` (from 1)."""
        if self.decay:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
            pairs = [(a, p.detach()) for a, p in zip(self.averages, self.parameters, strict=True)]
            alike = [(average, weight) for average, weight in pairs if average.dtype == weight.dtype]
            if alike:
                averages, weights = zip(*alike, strict=True)
                torch._foreach_lerp_(averages, weights, share)
            for average, weight in pairs:  # those in bf16 one by one, as each makes a copy in fp32
                if average.dtype != weight.dtype:
                    average.lerp_(weight.to(average.dtype), share)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The averages in the parameters' place for the length of the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for i, (average, parameter) in enumerate(zip(self.averages, self.parameters, strict=False)):
            if average.dtype != parameter.dtype:  # of a weight in bf16, which a copy would be rounded to
                self.averages[i], parameter.data = parameter.data, average
                continue
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {f"ema.{i}": average for i, average in enumerate(self.averages)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for i, average in enumerate(self.averages):
            average.copy_(tensors[f"ema.{i}"])
