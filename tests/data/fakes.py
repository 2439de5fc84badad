"""A base that counts what it encodes, and pictures to feed it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from impasto.core.rng import generator
from impasto.diffusion.process import DDPM
from impasto.families.base import Base, Caption, TextStates


@dataclass
class FakeBase(Base):
    """Moments are block means of the pixels, text states are made of the caption's digest. Nothing is learned."""

    family = "fake"
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)

    settings: dict[str, Any] = field(default_factory=dict)
    shows: tuple[str, ...] = ()  # what it is shown beside latents
    names: dict[str, str] = field(default_factory=lambda: {"unet": "u", "vae": "v", "text_encoder": "t"})
    encoded_pictures: int = 0
    encoded_captions: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, **changes: Any) -> FakeBase:
        modules = {name: nn.Linear(2, 2) for name in ("unet", "vae", "text_encoder")}
        return cls(modules, DDPM.from_scheduler_config({}), **changes)

    @classmethod
    def from_checkpoints(cls, checkpoints: Any, **options: Any) -> FakeBase:
        raise NotImplementedError

    @property
    def native_size(self) -> int:
        return 64

    def encode_text(self, captions: Sequence[Caption]) -> TextStates:
        rows = []
        for caption in captions:
            text = caption if isinstance(caption, str) else repr(caption)
            self.encoded_captions.append(text)
            rows.append(torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.float32))
        return {"states": torch.stack(rows)[:, None]}

    @property
    def extras(self) -> tuple[str, ...]:
        return self.shows

    def text_settings(self) -> dict[str, Any]:
        return self.settings

    @property
    def cell(self) -> int:
        return 8

    @property
    def latent_channels(self) -> int:
        return 3

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.encoded_pictures += len(pixels)
        mean = nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([mean, mean.square()], 1)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def set_latent_scale(self, scale: float) -> None:
        raise NotImplementedError

    def save_tools(self, folder: Path) -> dict[str, list[str]]:
        return {}

    def decode_latents(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def condition(self, text: TextStates, geometry: Any = None, extras: Any = None) -> Any:
        raise NotImplementedError

    def predict(self, latents: Tensor, time: Tensor, condition: Any) -> Tensor:
        raise NotImplementedError

    def targets(self, word: str) -> list[str]:
        raise NotImplementedError

    def parts(self, word: str) -> list[str]:
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str]:
        return self.names


def noise_picture(key: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A random picture of (height, width), a function of its key."""
    pixels = torch.randint(0, 256, (*size, 3), generator=generator(key, "picture"), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def write_picture(path: Path, key: int = 0, size: tuple[int, int] = (64, 64), caption: str | None = None) -> Path:
    """A random picture and its caption file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_picture(key, size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def smooth(size: tuple[int, int]) -> Image.Image:
    """A gradient, which survives JPEG: red grows to the right, green downwards."""
    y, x = np.mgrid[0:size[0], 0:size[1]]
    pixels = np.stack([255 * x / (size[1] - 1), 255 * y / (size[0] - 1), np.full(size, 60)], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))
