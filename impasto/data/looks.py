"""One look at each picture's file: what it is, what it shows and how it is stored; remembered, so that it is one look.

A file is decoded once, several at a time, and none is kept. A JPEG is decoded at a half, a quarter or an eighth where
that is enough: its whole data are read all the same, so that what is damaged is found exactly as in a run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from impasto.core.files import Remembered
from impasto.core.progress import SILENT, Reporter
from impasto.data.dataset import FRESH_SECONDS, Listing, Problem, Size, each_picture, opened, to_rgb
from impasto.data.similar import grid_colours, picture_hash

#: raise it when a look tells something else; with Pillow's version, since another one may read what this one cannot
VERSION = f"1 {PIL.__version__}"
#: longest side in pixels at which sharpness is measured; larger pictures are averaged down to it, smaller ones left
SIDE = 512
#: side in pixels at which a picture's main colour is looked for, and how far from it a value of 255 may be
COLOUR_SIDE, COLOUR_REACH = 64, 16
#: EXIF's orientation, and those of its values that lie on their side
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class Look:
    """What is known of a picture that can be decoded. All values are JSON's own, for the memory."""

    digest: str  # as `Picture.digest`
    height: int  # upright
    width: int
    bytes: int
    format: str  # Pillow's word: JPEG, PNG, MPO …
    mode: str  # as it is stored: RGB, CMYK, P, … and RGB;16 for what is reduced to 8 bits
    turned: bool  # EXIF says that it lies on its side, or is mirrored
    animated: bool  # it has more frames, or pages, than the one that is used
    clear: float  # how much of it is transparent: a share of its area
    colour: str  # its main colour, #rrggbb
    colour_share: float  # how much of it is (nearly) of that colour
    contrast: float  # variance of its greys, 0 to 255, at no more than SIDE pixels
    laplacian: float  # variance of their Laplacian there
    hash: str  # `picture_hash` in hex; "" for none
    colours: str  # `grid_colours` in hex

    @property
    def size(self) -> Size:
        """Upright."""
        return self.height, self.width

    @property
    def alpha(self) -> bool:
        """Whether any of it can be seen through."""
        return self.clear > 0


def look_at(data: bytes) -> Look:
    """Everything about the picture in a file's bytes. Raises `ValueError` that says why it cannot be decoded."""
    with opened(data) as image:
        stored, kind, mode, animated = image.size, image.format or "", _mode(image), _animated(image)
        image.draft(None, _within(stored))
        reduced = image.size != stored
        image.load()
        orientation = image.getexif().get(ORIENTATION, 1)
        upright = ImageOps.exif_transpose(image)
    width, height = upright.size if not reduced else stored[::-1] if orientation in LYING else stored
    clear = _clear(upright)
    small = to_rgb(upright)
    if max(small.size) > SIDE:
        small = small.resize(_within(small.size), Image.Resampling.BOX)
    contrast, laplacian = sharpness(small)
    colour, share = main_colour(small)
    shown = picture_hash(small)
    return Look(hashlib.blake2b(data, digest_size=16).hexdigest(), height, width, len(data), kind, mode,
                orientation in range(2, 9), animated, round(clear, 4), colour, round(share, 4), round(contrast, 2),
                round(laplacian, 3), "" if shown is None else f"{shown:016x}", grid_colours(small).hex())


def look_over(listing: Listing, remembered: Remembered, report: Reporter = SILENT,
              title: str = "pictures") -> tuple[dict[str, Look], list[Problem]]:
    """A look at every picture of a folder, by its name, and what cannot be decoded; in the listing's order."""
    looks: dict[str, Look] = {}
    problems: list[Problem] = []
    known = functools.partial(_recall, remembered)
    for name, (seen, lasting), new in each_picture(listing.files, remembered, known, _examine, report, title):
        if isinstance(seen, str):
            problems.append(Problem(name, seen))
        else:
            looks[name] = seen
        if new and lasting:
            _remember(remembered, listing.folder / name, seen)
    return looks, problems


# --- what a picture shows ----------------------------------------------------------------------------------


def sharpness(image: Image.Image) -> tuple[float, float]:
    """Variance of the greys, and of their Laplacian (the four neighbours less four times the middle)."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    if min(grey.shape) < 3:
        return float(grey.var()), 0.0
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return float(grey.var()), float(laplacian.var())


def main_colour(image: Image.Image) -> tuple[str, float]:
    """The colour that most of an RGB picture has, and the share that is within COLOUR_REACH of it."""
    pixels = np.asarray(image.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)).reshape(-1, 3).astype(np.int64)
    cells = (pixels >> 4) @ (256, 16, 1)
    colour = np.median(pixels[cells == np.bincount(cells).argmax()], axis=0)
    share = (np.abs(pixels - colour).max(axis=1) <= COLOUR_REACH).mean()
    return "#" + "".join(f"{round(value):02x}" for value in colour), float(share)


def _within(size: tuple[int, int]) -> tuple[int, int]:
    """The size, its longest side reduced to SIDE."""
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _mode(image: Image.Image) -> str:
    """Of a picture that is not loaded yet: Pillow reads 16 bits of colour as 8 and tells it in the raw mode alone."""
    raw = str(image.tile[0][3]) if isinstance(image.tile, Sequence) and image.tile else ""  # pyright: ignore
    return f"{image.mode};16" if ";16" in raw and ";16" not in image.mode else image.mode


def _animated(image: Image.Image) -> bool:
    """Frames or pages beside the first. A camera's JPEG with a small picture beside the large one (MPO) is neither."""
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def _clear(image: Image.Image) -> float:
    """The share of a picture that is transparent."""
    if not image.has_transparency_data:
        return 0.0
    return 1 - float(np.asarray(image.convert("RGBA").getchannel("A")).mean()) / 255


# --- the memory --------------------------------------------------------------------------------------------


def _examine(path: Path) -> tuple[Look | str, bool]:
    """A look, or what is wrong; and whether that is so for as long as the file stays as it is."""
    try:
        return look_at(path.read_bytes()), True
    except OSError as error:
        return f"cannot be read ({error.strerror or error})", False
    except ValueError as error:
        return str(error), True


def _recall(remembered: Remembered, path: Path) -> tuple[Look | str, bool] | None:
    try:
        facts = remembered.get(path, "look")
    except OSError:
        return None  # a dangling link: _examine will say so
    if not isinstance(facts, list) or len(facts) != 2 or facts[0] != VERSION:
        return None
    return (facts[1] if isinstance(facts[1], str) else Look(*facts[1])), True


def _remember(remembered: Remembered, path: Path, seen: Look | str) -> None:
    """Keep a look, and what a run asks of the picture (`dataset.survey`), which then need not decode it either."""
    if time.time() - path.stat().st_mtime <= FRESH_SECONDS:
        return
    if isinstance(seen, str):
        remembered.put(path, "look", [VERSION, seen])
    else:
        remembered.put(path, "look", [VERSION, list(dataclasses.astuple(seen))])
        remembered.put(path, "picture", [seen.digest, seen.height, seen.width])
