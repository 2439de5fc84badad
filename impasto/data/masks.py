"""Masks: which parts of a picture its loss counts. A picture's own transparency, or a grey picture beside it.

White (opaque) counts in full, black (transparent) as little as `data.mask_floor` says. A mask goes the way of its
picture: it is scaled, cut, turned and mirrored with it, and then averaged over each latent cell (kohya's `area`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import posixpath
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from impasto.core.errors import UserError
from impasto.core.files import Remembered
from impasto.core.progress import SILENT, Reporter
from impasto.data.dataset import (
    FRESH_SECONDS,
    MASK_SUFFIX,
    Listing,
    Problem,
    Size,
    decode,
    each_picture,
    list_folder,
    located,
    memory_of,
    normal,
    opened,
    read_unchanged,
)
from impasto.data.options import DataOptions

if TYPE_CHECKING:
    from torch import Tensor

    from impasto.data.augment import Variant


@dataclass(frozen=True)
class Mask:
    """One picture's mask. Equal contents have equal digests."""

    path: Path  # the picture's own, if its transparency is the mask
    digest: str  # blake2b-128 of the file's bytes
    alpha: bool  # its transparency counts, not its greys

    def read(self) -> Image.Image:
        """Its greys, 8 bits, upright. Raises `UserError` where it is not the file any more that was surveyed."""
        grey = greys(read_unchanged(self.path, self.digest), self.alpha)
        assert grey is not None, "what has no transparency is no mask"
        return grey


def greys(data: bytes, alpha: bool) -> Image.Image | None:
    """The mask in a file's bytes: its greys, on black where it is transparent, or its transparency alone, None where
    it has none. Raises `ValueError` that says why it cannot be decoded."""
    if not alpha:
        return decode(data, "black").convert("L")
    with opened(data) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None


# --- on the way of a batch ---------------------------------------------------------------------------------


def cells(mask: Mask, variant: Variant, cell: int) -> Tensor:
    """What is white of each latent cell, (1, h, w), fp32 in [0, 1], as that variant shows the picture, not mirrored.

    `cell`: pixels along its side. A sum of whole numbers: mirrored, it is the mirrored picture's to the bit.
    """
    import torch

    window = np.asarray(variant.window(mask.read()))
    height, width = window.shape
    total = window.reshape(height // cell, cell, width // cell, cell).sum(axis=(1, 3), dtype=np.int64)
    return torch.from_numpy((total / (255 * cell * cell)).astype(np.float32))[None]


def cell_weights(white: Tensor, floor: float, normalised: bool) -> Tensor:
    """What each cell's loss is multiplied by, (1, h, w): at least `floor`; with a mean of 1 if `normalised`.

    OneTrainer's: the smallest weight is a floor, not an offset, and the mean is taken after it.
    """
    weights = white.clamp(min=floor)
    return weights / weights.mean().clamp(min=1e-6) if normalised else weights


# --- which ones there are ----------------------------------------------------------------------------------


def without_masks(listing: Listing, data: DataOptions) -> Listing:
    """A folder's listing without what lies in `data.masks`. Raises `UserError` as `without_folder` does."""
    return without_folder(listing, data.masks, "data.masks", "masks")


def without_folder(listing: Listing, inner: str | None, key: str, what: str) -> Listing:
    """A folder's listing without what lies in `inner`, which the recipe's `key` names, where that is a folder inside.

    Raises `UserError` if nothing is left.
    """
    if inner is None:
        return listing
    folder, outer = located(inner).absolute(), listing.folder.absolute()
    if folder == outer or not folder.is_relative_to(outer):
        return listing
    inside = folder.relative_to(outer).as_posix()
    kept = {key: [name for name in getattr(listing, key) if not name.startswith(f"{inside}/")]
            for key in ("pictures", "captions", "unreadable", "tables", "masks")}
    if listing.pictures and not kept["pictures"]:
        raise UserError(f"there are no pictures beside the {what}", where=listing.folder,
                        fix=f"{key} is the folder of the {what} alone")
    return dataclasses.replace(listing, **kept)


def read_masks(listing: Listing, sizes: Mapping[str, Size], data: DataOptions,
               report: Reporter = SILENT) -> tuple[dict[str, Mask], list[Problem]]:
    """The masks of those pictures of a folder whose upright `sizes` are known, by their names, and what is wrong.

    A picture without one is a problem unless `data.missing_masks` allows it. Raises `UserError` for a `data.masks` that
    is no folder of pictures.
    """
    if data.mask == "none":
        return {}, []
    problems: list[Problem] = []
    wanted: dict[str, Path] = {}
    files = {} if data.mask == "alpha" else _files(listing, data)
    for name in sizes:
        own = [listing.folder / name] if data.mask == "alpha" else files.get(_stem(name), [])
        if len(own) > 1:
            problems.append(Problem(name, f"has two masks, {own[0].name} and {own[1].name}"))
        elif own:
            wanted[name] = own[0]
        elif data.missing_masks == "error":
            place = f"{posixpath.basename(_stem(name))}.png in {data.masks}" if data.masks else \
                f"{posixpath.basename(_stem(name))}{MASK_SUFFIX}.png"
            problems.append(Problem(name, f"has no mask ({place})"))
    found: dict[str, Mask] = {}
    for name, facts in _examined(wanted, data.mask == "alpha", memory_of(listing.folder), report).items():
        path = wanted[name]
        if isinstance(facts, str):
            problems.append(Problem(name, facts if data.mask == "alpha" else f"its mask {path.name} {facts}"))
            continue
        digest, height, width, white = facts
        if white is None:
            if data.missing_masks == "error":
                problems.append(Problem(name, "has no alpha channel, which is to be its mask"))
        elif not fits((height, width), sizes[name]):
            problems.append(Problem(name, f"its mask {path.name} is of another shape: {width}x{height} pixels, the "
                                    f"picture has {sizes[name][1]}x{sizes[name][0]}"))
        elif not white and data.inpaint == "mask":
            problems.append(Problem(name, "is transparent all over, and nothing of it would be drawn anew"
                                    if data.mask == "alpha" else
                                    f"its mask {path.name} is all black, and nothing would be drawn anew"))
        elif not white and not data.mask_floor:
            problems.append(Problem(name, "is transparent all over, and nothing of it would count (data.mask_floor)"
                                    if data.mask == "alpha" else
                                    f"its mask {path.name} is all black, and nothing would count (data.mask_floor)"))
        else:
            found[name] = Mask(path, digest, data.mask == "alpha")
    order = {name: i for i, name in enumerate(listing.pictures)}
    return found, sorted(problems, key=lambda problem: order[problem.name])


def fits(mask: Size, picture: Size) -> bool:
    """Whether a mask is as large as its picture, or the same picture larger or smaller, but for a pixel of rounding."""
    return abs(mask[0] * picture[1] - mask[1] * picture[0]) < max(*mask, *picture) or mask == picture


def _files(listing: Listing, data: DataOptions) -> dict[str, list[Path]]:
    """Mask files by the stem of the picture that they are of."""
    found: dict[str, list[Path]] = defaultdict(list)
    if data.masks is None:
        places = [(listing.folder, name) for name in listing.masks]
    else:
        there = list_folder(located(data.masks), "data.masks", "masks")
        places = [(there.folder, name) for name in sorted([*there.pictures, *there.masks])]
    for folder, name in places:
        found[_stem(name).removesuffix(MASK_SUFFIX)].append(folder / name)
    return found


def _stem(name: str) -> str:
    return normal(posixpath.splitext(name)[0])


#: digest, upright height and width, and whether anything of it is white, None where there is no transparency
Facts = tuple[str, int, int, bool | None]


def _examined(wanted: Mapping[str, Path], alpha: bool, remembered: Remembered,
              report: Reporter) -> dict[str, Facts | str]:
    """What there is to know of each mask, or what is wrong with it; what is good is remembered."""
    kind = "alpha" if alpha else "mask"
    found: dict[str, Facts | str] = {}
    for name, facts, new in each_picture(wanted, remembered, lambda path: _recall(remembered, path, kind),
                                         lambda path: _examine(path, alpha), report, "masks"):
        found[name] = facts
        if new and not isinstance(facts, str) and time.time() - wanted[name].stat().st_mtime > FRESH_SECONDS:
            remembered.put(wanted[name], kind, list(facts))
    return found


def _recall(remembered: Remembered, path: Path, kind: str) -> Facts | str | None:
    try:
        facts = remembered.get(path, kind)
    except OSError:
        return None  # _examine will say so
    return (facts[0], facts[1], facts[2], facts[3]) if isinstance(facts, list) and len(facts) == 4 else None


def _examine(path: Path, alpha: bool) -> Facts | str:
    try:
        data = path.read_bytes()
        grey = greys(data, alpha)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return (digest, 0, 0, None) if grey is None else (digest, grey.height, grey.width, grey.getbbox() is not None)
