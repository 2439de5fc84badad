"""Which weights are shown: what previews, validation and artifacts see in the place of those that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from impasto.training.ema import Ema


class Shown:
    """The averages, if there are any; else what the optimizer answers for; else the weights as they are.

    Averages are of what the optimizer answers for. Whatever is shown, the trained weights are afterwards, bit for
    bit, what they were.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.ema, self.optimizer = Ema(parameters, decay), optimizer

    def update(self, step: int) -> None:
        """Let the averages follow, after optimizer step `step` (from 1)."""
        if self.ema.decay:
            with answered(self.optimizer):
                self.ema.update(step)

    def weights(self) -> AbstractContextManager[None]:
        """What is shown in the parameters' place, for the length of the block."""
        return self.ema.shown() if self.ema.decay else answered(self.optimizer)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return self.ema.state()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.ema.load(tensors)


@contextmanager
def answered(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In the parameters' place, the weights that the optimizer answers for, for the length of the block.

    A schedule-free one takes gradients at y = (1 - β) z + β x and answers for x (Defazio et al. 2024,
    arXiv:2405.15682); others answer for what they train. The library's own way there and back, eval() and train(),
    rounds.
    """
    live: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            if "train_mode" in group:
                beta = group["betas"][0] if "betas" in group else group["momentum"]
                for parameter in group["params"]:
                    if "z" in optimizer.state.get(parameter, {}):
                        live.append((parameter, parameter.detach().clone()))
                        parameter.lerp_(optimizer.state[parameter]["z"], 1 - 1 / beta)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, kept in live:
                parameter.copy_(kept)
