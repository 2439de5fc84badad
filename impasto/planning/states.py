"""Optimizers on fake tensors: the recipe's own where it can be traced, else one that holds as much.

bitsandbytes' kernels want real addresses. What their optimizers keep is a formula of its source, blockwise since 0.36.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from impasto.training import optimizers
from impasto.training.recipe import TrainOptions

#: bitsandbytes.optim.optimizer.Optimizer8bit and 2State: weights of fewer elements keep fp32 states; an fp32 scale for
#: each block of so many others; two tables of 256 numbers
LEAST, BLOCK, TABLE = 4096, 256, 256


class Sized(torch.optim.Optimizer):
    """Keeps `count` states for each weight, of 8 bits or of 32, and does nothing with them."""

    def __init__(self, groups: list[dict[str, Any]], count: int, eight: bool) -> None:
        super().__init__(groups, {"lr": 1.0})
        self.count, self.eight = count, eight
        self.tables: dict[str, torch.Tensor] = {}

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make states where there are none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._made(parameter)

    def _made(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.eight or parameter.numel() < LEAST:
            return {f"state{i + 1}": torch.zeros_like(parameter, dtype=torch.float32) for i in range(self.count)}
        made = {}
        for i in range(1, self.count + 1):
            self.tables.setdefault(f"qmap{i}", torch.empty(TABLE))
            made[f"state{i}"] = torch.zeros_like(parameter, dtype=torch.uint8)
            made[f"qmap{i}"] = self.tables[f"qmap{i}"]
            made[f"absmax{i}"] = torch.zeros(-(-parameter.numel() // BLOCK))
        return made


def make_optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> torch.optim.Optimizer:
    """The recipe's optimizer over fake weights. Raises `UserError` as the trainer does, but for a missing library."""
    entry = optimizers.OPTIMIZERS.get(options.optimizer)
    if entry is not None and entry.path.startswith("bitsandbytes"):
        name = entry.path.rpartition(":")[2]
        return Sized([{"params": group["params"]} for group in groups], 1 if "Lion" in name else 2, "8bit" in name)
    if entry is None:  # whether it comes back from a checkpoint is tried on real weights
        with _disable_current_modes():
            return optimizers.make_optimizer(groups, options, torch.device("cpu"))
    return optimizers.make_optimizer(groups, options, torch.device("cpu"))
