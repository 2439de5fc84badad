"""A miniature checkpoint, a folder of small pictures, and the recipe over both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from impasto.core.rng import generator
from impasto.training.recipe import Recipe, make_recipe
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature SD 1.x single file with random weights."""
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors", family="sd1", size="mini",
                            layout="ldm", seed=0)


def draw(path: Path, key: int, size: tuple[int, int] = (80, 72)) -> None:
    """A smooth random picture, a function of its key."""
    noise = torch.rand(3, 5, 5, generator=generator(key, "picture"))
    pixels = torch.nn.functional.interpolate(noise[None], size=size[::-1], mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of three shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for key, size in enumerate([(80, 72), (64, 64), (64, 128), (64, 64), (80, 72)]):
        draw(folder / f"{key}.png", key, size)
    return folder


@pytest.fixture(scope="session")
def class_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("class")
    for key in range(3):
        draw(folder / f"{key}.png", 100 + key, (64, 64))
    return folder


def tree(mini: Path, photos: Path, out: Path, **sections: Any) -> dict[str, Any]:
    """A recipe of six steps as nested dictionaries, overridden section by section."""
    made: dict[str, Any] = {
        "base": {"path": str(mini)},
        "data": {"folder": str(photos), "caption": "a photo of sks dog", "resolution": 64},
        "method": {"kind": "lora", "rank": 4},
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "device": "cpu"},
        "sample": {"every": 0},
        "output": {"dir": str(out), "name": "dog", "checkpoint_every": 2},
    }
    for section, keys in sections.items():
        made[section] = {**made.get(section, {}), **keys}
    return made


@pytest.fixture
def recipe(mini: Path, photos: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(name, section={key: value}, …)`: a run in a directory of that name."""
    return lambda name="run", **sections: make_recipe(tree(mini, photos, tmp_path / name, **sections))
