"""What the means that save memory do not go with, and why: told before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from impasto.core.errors import UserError
from impasto.methods import METHODS
from impasto.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from impasto.training.environment import Precision
    from impasto.training.processes import Processes
    from impasto.training.recipe import Recipe
    from impasto.training.sections import TrainOptions


def check_means(recipe: Recipe) -> None:
    """Raises `ValueError` for means of a recipe that do not go with its other settings."""
    if recipe.train.fused_backward:
        _fused(recipe)
    if "optimizer" in recipe.train.offload:
        _states(recipe.train)
    if "blocks" in recipe.train.offload:
        _blocks(recipe)
    whole = [method.kind for method in recipe.method if METHODS.get(method.kind).in_place]
    for key in ("quantize", "quantize_text"):
        if whole and getattr(recipe.base, key) != "none":
            raise ValueError(f"base.{key} is for frozen weights, and {whole[0]} trains them: train a lora, or leave it "
                             "out")


def check_here(options: TrainOptions, precision: Precision, processes: Processes) -> None:
    """Raises `UserError` for means that cannot be had on this device, or in so many processes."""
    if options.fused_backward and processes.count > 1:
        raise UserError("gradients are added up over all processes before any step, and a fused backward takes steps "
                        "before all are there", where="train.fused_backward", fix="train with one process")
    if options.fused_backward and precision.scaler().is_enabled():
        raise UserError(SCALED, where="train.fused_backward", fix="take train.precision=bf16 or fp32")
    if "optimizer" in options.offload and precision.scaler().is_enabled():
        raise UserError(SCALED, where="train.offload", fix="take train.precision=bf16 or fp32")


#: why a fused backward needs a loss as it is
SCALED = "fp16 scales the loss, and gradients are scaled back, and looked through, before any step"


def _states(train: TrainOptions) -> None:
    entry, why = OPTIMIZERS.get(train.optimizer), ""
    if (entry.path if entry else train.optimizer).startswith("bitsandbytes"):
        why = "moves states as they are, and bitsandbytes' share their tables: paged_adamw8bit moves its own"
    elif entry is not None and entry.whole:
        why = f"steps weight by weight, and {train.optimizer} counts over all weights at once: take adamw"
    elif train.precision == "fp16":
        why = f"cannot be: {SCALED}"
    if why:
        raise ValueError(f"train.offload \"optimizer\" {why}")


def _blocks(recipe: Recipe) -> None:
    why = ""
    if recipe.train.checkpointing is not True:
        why = "lets a block's weights go after its forward, and its backward needs them: say train.checkpointing = true"
    elif recipe.train.compile:
        why = "moves weights while the network runs, which a compiled one does not see: leave train.compile out"
    if why:
        raise ValueError(f"train.offload \"blocks\" {why}")


def _fused(recipe: Recipe) -> None:
    train, entry = recipe.train, OPTIMIZERS.get(recipe.train.optimizer)
    kinds = [method.kind for method in recipe.method if not METHODS.get(method.kind).in_place]
    why = ""
    if kinds:
        why = f"saves the gradients of whole networks, and {kinds[0]}'s are small: it is for method full"
    elif train.accumulation > 1:
        why = "uses each gradient at once, and train.accumulation adds up several"
    elif recipe.prior is not None:
        why = "uses each gradient at once, and class pictures ([prior]) have a backward of their own"
    elif train.clip:
        why = "steps before all gradients are there, and train.clip wants their common norm: say train.clip = 0"
    elif train.precision == "fp16":
        why = f"cannot be: {SCALED}"
    elif entry is not None and entry.whole:
        why = f"steps weight by weight, and {train.optimizer} counts over all weights at once: take adamw"
    if why:
        raise ValueError(f"train.fused_backward {why}")
