"""Pictures like photographs, drawn: detail at all scales, in colour; and every kind of folder that is made of them."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

#: long enough ago that a file is remembered
OLD = 1_600_000_000


@functools.cache
def photo(seed: int, size: tuple[int, int] = (180, 240)) -> Image.Image:
    """A picture of (height, width) whose detail falls off with frequency as a photo's does, a function of its seed."""
    rng = np.random.default_rng(seed)
    height, width = size
    pixels = np.zeros((height, width, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        small = Image.fromarray((rng.random((cells, cells, 3)) * 255).astype(np.uint8))
        grown = small.resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(grown) / 255 - 0.5) * (2 / cells) ** 0.6
    pixels += rng.random((height, width, 3)) * 0.02
    low, high = np.percentile(pixels, [1, 99])
    return Image.fromarray((np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def put(path: Path, data: bytes | Image.Image, caption: str | None = None, **options: object) -> Path:
    """A file of an age at which it is remembered, and its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, Image.Image):
        data.save(path, **options)
    else:
        path.write_bytes(data)
    os.utime(path, (OLD, OLD))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def good_folder(folder: Path, count: int = 6, size: tuple[int, int] = (512, 512)) -> Path:
    """Different pictures of one size, each with a caption of its own."""
    for i in range(count):
        put(folder / f"{i:03}.jpg", photo(i, size), f"picture {i} of the folder")
    return folder


def distance(first: int, second: int) -> int:
    """The bits in which two hashes differ."""
    return (first ^ second).bit_count()
