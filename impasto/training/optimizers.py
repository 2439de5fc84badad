"""Optimizers from their libraries, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from impasto.core.errors import MissingExtra, UserError
from impasto.training.muon import Muon
from impasto.training.recipe import TrainOptions


def make_optimizer(groups: list[dict[str, Any]], options: TrainOptions, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (fused where it can be: lowest peak memory), bitsandbytes' 8-bit AdamW, or Muon over parameter groups.

    A group's "lr" of None means train.learning_rate. Each group keeps its rate as "base_lr".
    """
    for group in groups:
        group["lr"] = group["base_lr"] = group.get("lr") or options.learning_rate
    if options.optimizer == "muon":
        return Muon(groups, betas=options.betas, weight_decay=options.weight_decay, eps=options.eps)
    settings: dict[str, Any] = dict(betas=options.betas, weight_decay=options.weight_decay, eps=options.eps)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu", "mps"), **settings)
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtra("bitsandbytes", "8bit") from None
    if device.type == "mps":
        raise UserError("8-bit AdamW has no kernels for mps", where="train.optimizer", fix="use adamw")
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def rate_factor(step: int, total: int, options: TrainOptions) -> float:
    """What the base rate is multiplied by at optimizer step `step` (from 0) of `total`.

    Linear warm-up, then constant, a half cosine to zero, or a line to zero (transformers' get_scheduler,
    whose first step after no warm-up has the full rate).
    """
    if step < options.warmup:
        return step / options.warmup
    left = (step - options.warmup) / max(1, total - options.warmup)
    match options.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * left)))
        case "linear":
            return max(0.0, 1 - left)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
