"""When the device's memory is full all the same: what is saved, and what is said."""

from __future__ import annotations

import re

import torch

from impasto.core.errors import UserError
from impasto.training.run import Run

#: means, from the cheapest on, of which the message names those that a recipe has not taken
MEANS = ("train.checkpointing=true", "train.batch_size=1", "base.quantize=int8")


def memory_is_full(error: torch.OutOfMemoryError, step: int, device: torch.device, run: Run, saved: bool,
                   taken: set[str]) -> UserError:
    """What to say of it in optimizer step `step` (from 0): by how much, where the run stands, and what to change.

    `taken`: those of `MEANS` that the recipe has already.
    """
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    held = f", with {_gib(torch.cuda.max_memory_allocated(device))} in use at most" if device.type == "cuda" else ""
    room = f" of {_gib(torch.cuda.get_device_properties(device).total_memory)}" if device.type == "cuda" else ""
    wants = f": {asked[1]} more were asked for" if asked else ""
    left = [means for means in MEANS if means not in taken]
    stands = f"the run is saved after step {step}" if saved else \
        f"the last checkpoint is {run.checkpoints()[0].name}" if run.checkpoints() else "nothing was learned yet"
    return UserError(
        f"the device's memory{room} is full at step {step + 1}{wants}{held}; {stands}", where=run.folder,
        fix=f"impasto plan says what to change so that it fits, such as {left[0] if left else 'a lower method.rank'}; "
        "then the same command, with --accept-changes, goes on")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
