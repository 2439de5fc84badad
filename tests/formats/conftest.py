"""Checkpoints to read, and to change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import build, component_configs, spelled, write_checkpoint


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("single") / "mini.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("folder") / "mini", layout="diffusers")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def changed(single: Path, tmp_path: Path) -> Callable[..., Path]:
    """The single file with its tensors or metadata changed."""
    def write(change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
              metadata: dict[str, str] | None = None, drop: tuple[str, ...] = ()) -> Path:
        from impasto.formats.header import read_header

        tensors = load_file(single)
        change(tensors)
        texts = {k: v for k, v in {**read_header(single).metadata, **(metadata or {})}.items() if k not in drop}
        save_file(tensors, tmp_path / "changed.safetensors", texts)
        return tmp_path / "changed.safetensors"
    return write


@pytest.fixture(scope="module")
def own() -> dict[str, Tensor]:
    """The weights that `write_checkpoint` draws, under the networks' own names."""
    return {f"{part}.{name}": tensor for part, config in component_configs().items()
            for name, tensor in spelled(build(part, config)).items()}
