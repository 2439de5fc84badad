"""The optimizer's step on half-precision weights: computed in fp32, rounded stochastically.

Rounded to the nearest, a weight in bf16 (8 bits of mantissa) never moves by an update below a 1/256 of it, which most
of fine-tuning's are. Rounded up or down with probabilities such that the mean is the value itself, it moves as far as
the updates say, in the mean (Gupta et al. 2015, arXiv:1502.02551; for bf16 weights Zamirai et al. 2020,
arXiv:2010.06192). No copy in fp32 outlives the step: one of BUCKET weights at a time is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.core.rng import seed_for
from impasto.training.offload import States
from impasto.training.optimizers import ADAPTIVE, SCHEDULE_FREE

#: weights whose fp32 copies are alive together: 128 MiB with their gradients
BUCKET = 2**24


class Steps:
    """An optimizer's steps. Weights in fp32 take them as the optimizer itself does, those in bf16 as told above.

    `modules`: what is trained, by name. Draws are functions of `seed`, of the step and of a weight's name, by the
    generator of the weight's device. `apart`: whether those in fp32, too, take their steps one after the other; so they
    do where the optimizer's `states` wait elsewhere. Raises `UserError` for an optimizer that cannot, where some do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module], seed: int, *,
                 apart: bool = False, states: States | None = None) -> None:
        self.optimizer, self.seed, self.states = optimizer, seed, states
        self.names = {parameter: f"{prefix}.{name}" for prefix, module in modules.items()
                      for name, parameter in module.named_parameters() if parameter.dtype == torch.bfloat16}
        if (self.names or apart or states) and type(optimizer).__name__ in ADAPTIVE | SCHEDULE_FREE:
            raise _refused(optimizer)
        self._group = {parameter: i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}

    @torch.no_grad()
    def take(self, step: int, scaler: torch.amp.GradScaler) -> None:
        """Optimizer step `step` (from 0), of the gradients that are there, which `scaler` has scaled back."""
        if not self.names and self.states is None:
            scaler.step(self.optimizer)
            return
        with self._groups() as groups:
            if self.states is None:
                self._step_with([[p for p in params if p not in self.names] for params in groups])
            for bucket in self._buckets(groups):
                alone = [[p for p in params if p in bucket] for params in groups]
                if next(iter(bucket)) in self.names:
                    self._bucket(bucket, step, alone)
                else:
                    self._step_with(alone)

    @torch.no_grad()
    def one(self, parameter: nn.Parameter, step: int) -> None:
        """Optimizer step `step` (from 0) of one weight alone, of the gradient that it has."""
        with self._groups() as groups:
            alone = [[parameter] if i == self._group[parameter] else [] for i in range(len(groups))]
            if parameter in self.names:
                self._bucket({parameter: None}, step, alone)
            else:
                self._step_with(alone)

    @contextmanager
    def _groups(self) -> Iterator[list[list[nn.Parameter]]]:
        """The weights by the optimizer's groups, each of which has its own again afterwards."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        try:
            yield groups
        finally:
            for group, params in zip(self.optimizer.param_groups, groups, strict=True):
                group["params"] = params

    def _bucket(self, bucket: Mapping[nn.Parameter, None], step: int, groups: list[list[nn.Parameter]]) -> None:
        """The step of some weights, which are fp32 meanwhile: so is the state that an optimizer makes for them."""
        kept = {parameter: parameter.data for parameter in bucket}
        for parameter, narrow in kept.items():
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            parameter.data = narrow.float()
            parameter.grad = gradient.float()
            del gradient
        self._step_with(groups)
        for parameter, narrow in kept.items():
            generator = torch.Generator(narrow.device).manual_seed(
                seed_for(self.seed, step, "round", self.names[parameter]))
            narrow.copy_(stochastically_rounded(parameter.data, generator))
            parameter.grad = None
            parameter.data = narrow

    def _buckets(self, groups: Sequence[Sequence[nn.Parameter]]) -> Iterator[dict[nn.Parameter, None]]:
        """The weights that have gradients, so many at a time: those in bf16, and others whose states are elsewhere."""
        moving = [p for params in groups for p in params if p.grad is not None]
        for kind in ([p for p in moving if p in self.names],
                     [p for p in moving if p not in self.names] if self.states is not None else []):
            bucket, size = dict[nn.Parameter, None](), 0
            for parameter in kind:
                if bucket and size + parameter.numel() > BUCKET:
                    yield bucket
                    bucket, size = {}, 0
                bucket[parameter] = None
                size += parameter.numel()
            if bucket:
                yield bucket

    def _step_with(self, groups: list[list[nn.Parameter]]) -> None:
        """The optimizer's step of these weights alone, which are given group by group.

        Raises `UserError` if it counts something in its groups, for all weights together: it would count too often.
        """
        if not any(groups):
            return
        for group, params in zip(self.optimizer.param_groups, groups, strict=True):
            group["params"] = params
        before = [dict(group) for group in self.optimizer.param_groups]
        moved = (p for params in groups for p in params)
        with self.states.here(moved) if self.states is not None else nullcontext():
            self.optimizer.step()
        if before != self.optimizer.param_groups:
            raise _refused(self.optimizer)


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values in bf16, each rounded to one of its two neighbours, in the mean to itself.

    bf16 is fp32 without its lower 16 bits: a random number of 16 bits is added to them, and they are cut off. What is
    in bf16 already stays; infinities and NaN are cast.
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits = values.contiguous().view(torch.int32).add(noise).bitwise_and_(-(1 << 16))
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)


def _refused(optimizer: torch.optim.Optimizer) -> UserError:
    return UserError(f"{type(optimizer).__name__} counts over all weights at once, and these take their steps one "
                     "after the other (weights in bf16, train.fused_backward, train.offload)", where="train.optimizer",
                     fix="take adamw, or leave that out")
