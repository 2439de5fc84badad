"""What a run has to prove of itself: that whatever was asked to train does train, and that its losses are numbers.

A layer that gets no gradient in the first steps (a text encoder's last layer under clip skip, a part that the loss does
not reach) and a layer that is at the end what it was at the beginning are errors that name it; in other trainers they
are a night lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from impasto.core.errors import UserError
from impasto.training.environment import Precision
from impasto.training.run import Run

#: optimizer steps within which every layer must have had a gradient: LoRA's first factor gets its first in step 2
PATIENCE = 5


class Verdicts:
    """Watches trained modules, by their names in a checkpoint."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.layers = dict(_layers(modules))
        self.waiting = {name for name, layer in self.layers.items() if not getattr(layer, "sporadic", False)}
        self.beginning: dict[str, list[float]] = {}

    def begin(self, beginning: Mapping[str, Sequence[float]] | None = None) -> None:
        """Note what the weights are now, or what they were when the run began."""
        self.beginning = {name: list(marks) for name, marks in beginning.items()} if beginning else \
            {name: _marks(layer) for name, layer in self.layers.items()}

    def gradients(self, step: int, had: Collection[nn.Parameter] = ()) -> None:
        """Look at the gradients of optimizer step `step` (from 0); `had`: parameters that had one, which is gone.

        Raises `UserError` after PATIENCE steps.
        """
        if not self.waiting or step >= PATIENCE:
            return
        self.waiting = {name for name in self.waiting if not _has_gradient(self.layers[name], had)}
        if self.waiting and step == PATIENCE - 1:
            raise UserError(f"nothing reaches {_told(self.waiting)}: no gradient in the first {PATIENCE} steps",
                            where="training", fix="leave it out of what is trained (targets, parts or exclude), or "
                            "look at what bypasses it (base.clip_skip)")

    def end(self) -> None:
        """Raise `UserError` if a layer is what it was at the beginning."""
        same = {name for name, layer in self.layers.items() if _marks(layer) == self.beginning.get(name)}
        if same:
            raise UserError(f"{_told(same)} did not change in the whole run", where="training",
                            fix="nothing of it was learned: its learning rate may be far too low")


def not_finite(step: int, names: Iterable[Sequence[str]], precision: Precision, run: Run) -> UserError:
    """What to say of a loss that is not finite in optimizer step `step` (from 0), with which pictures in each process,
    and where the last good state is."""
    kept = run.checkpoints()
    advice = "use train.precision=bf16 or fp32" if precision.dtype == torch.float16 else \
        "lower train.learning_rate, or look at these pictures"
    return UserError(f"the loss is not finite at step {step + 1}, with {', '.join(n for own in names for n in own)}",
                     where=run.folder, fix=f"{advice}; the last good state is {kept[0] if kept else 'the start'}")


def _layers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The smallest modules with trained weights of their own."""
    for name, module in modules.items():
        for path, inner in module.named_modules():
            if any(p.requires_grad for p in inner.parameters(recurse=False)):
                yield f"{name}.{path}" if path else name, inner


def _has_gradient(layer: nn.Module, had: Collection[nn.Parameter]) -> bool:
    return any(p in had or p.grad is not None and bool(p.grad.count_nonzero())
               for p in layer.parameters(recurse=False))


@torch.no_grad()
def _marks(layer: nn.Module) -> list[float]:
    """Numbers that change when a weight does: each parameter's sum and its norm, and their sum by place."""
    marks = []
    for parameter in layer.parameters(recurse=False):
        flat = parameter.detach().double().flatten()
        place = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64)
        marks += [flat.sum().item(), flat.norm().item(), (flat / place).sum().item()]
    return [0.0 if math.isnan(mark) else mark for mark in marks]


def _told(names: set[str]) -> str:
    """One or a few names, without what a checkpoint puts before them."""
    shown = sorted(".".join(name.split(".")[2:]) or name for name in names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
