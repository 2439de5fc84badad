"""What is told of a checkpoint, and of a file that is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.formats.checkpoint import Checkpoint, open_checkpoint

TEXT = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."
UNET = "model.diffusion_model."
COMPONENTS = ("unet", "text_encoder", "vae")


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part in checkpoint.components for name, tensor in checkpoint.tensors(part)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    return line
