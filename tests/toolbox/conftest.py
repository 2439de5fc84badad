"""Small checkpoints, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_checkpoint

LAYOUTS = {"ldm": "base.safetensors", "diffusers": "base", "pickle": "base.ckpt"}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint's path, by layout, seed, type and variant."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(layout: str = "ldm", seed: int = 0, dtype: torch.dtype = torch.float32, variant: str = "") -> Path:
        path = folder / f"{seed}-{str(dtype)[6:]}-{variant}-{LAYOUTS[layout]}"
        if not path.exists():
            write_checkpoint(path, layout="diffusers" if layout == "diffusers" else "ldm", seed=seed, dtype=dtype,
                             variant=variant)
        return path

    return write
