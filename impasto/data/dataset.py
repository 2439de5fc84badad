"""A folder's pictures: found, decoded in full, set upright, and known by their content.

Everything that is wrong with them is told at once, before any long work begins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import posixpath
import struct
import time
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageOps

from impasto.core.errors import UserError
from impasto.core.files import Remembered, cache_dir, key_of
from impasto.core.progress import SILENT, Reporter

T = TypeVar("T")

#: what is read as a picture, by suffix in lower case
PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
#: pictures that Pillow alone cannot read: left out, but never silently
OTHER_PICTURE_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".psd", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw"})
#: captions beside pictures; a .json file is one where a picture has its name
CAPTION_SUFFIXES = frozenset({".txt", ".caption", ".json"})
#: tables of captions by name; .parquet files too, and .json files that lie beside no picture
TABLES = frozenset({"metadata.jsonl", "metadata.csv"})
#: how the name of a picture's mask ends, before its suffix (OneTrainer's)
MASK_SUFFIX = "-masklabel"
#: most pixels of a picture that is decompressed: where Pillow itself refuses (twice its warning's limit)
PIXEL_CAP = 178_956_970
#: what Pillow's decoders raise on damaged files
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError,
                 struct.error, zlib.error)
#: a file changed less than so many seconds ago may change again without a new time stamp (FAT counts in twos)
FRESH_SECONDS = 2.0

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Picture:
    """A picture that can be decoded. Equal contents have equal digests, whatever their names."""

    path: Path
    name: str  # relative to the folder, with forward slashes: what it is called in messages
    digest: str  # blake2b-128 of the file's bytes
    size: Size  # upright

    def read(self, background: str = "white") -> Image.Image:
        """Decode it, and make sure that it is still the file that was surveyed. Raises `UserError`."""
        return decode(read_unchanged(self.path, self.digest), background)


def read_unchanged(path: Path, digest: str) -> bytes:
    """The bytes of a file that was surveyed. Raises `UserError` where it is not that file any more."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read any more ({error.strerror})", where=path) from error
    if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
        raise UserError("has changed since this command started", where=path, fix="start it again")
    return data


@dataclass(frozen=True)
class Problem:
    """One file that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What lies in a folder: names relative to it, sorted, with forward slashes."""

    folder: Path
    pictures: list[str]
    captions: list[str]  # files beside pictures that may be captions
    unreadable: list[str]  # pictures of kinds that have no decoder here
    tables: list[str] = field(default_factory=list)  # files that may hold captions of many pictures
    masks: list[str] = field(default_factory=list)  # pictures beside others that are their masks, by their names
    sources: list[str] = field(default_factory=list)  # likewise, those that others are made of, where there are pairs

    @property
    def files(self) -> dict[str, Path]:
        """The pictures' files, by name."""
        return {name: self.folder / name for name in self.pictures}


def refuse(problems: Sequence[Problem], folder: Path, fix: str = "") -> None:
    """One `UserError` that lists all problems by name, if there are any; `fix`: what to do, beside mending them."""
    if len(problems) == 1:
        raise UserError(problems[0].reason, where=folder / problems[0].name,
                        fix=fix or "mend it or take it out of the folder")
    if problems:
        lines = "".join(f"\n  {p.name}: {p.reason}" for p in sorted(problems, key=lambda p: p.name))
        raise UserError(f"{len(problems)} files cannot be used:{lines}", where=folder,
                        fix=fix or "mend them or take them out of the folder")


def normal(name: str) -> str:
    """The name in Unicode's composed form: macOS and zip files may bring the decomposed one."""
    return unicodedata.normalize("NFC", name)


def _undecodable(name: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in name)


def check_folder(folder: str | None, key: str = "data.folder", what: str = "pictures") -> str:
    """The folder. Raises `UserError` where a recipe names none by `key`: planning alone can do without."""
    if folder is None:
        raise UserError(f"say where the {what} are", where="recipe", fix=f"{key}=…")
    return folder


def list_folder(folder: Path, key: str = "data.folder", what: str = "pictures") -> Listing:
    """Find pictures and captions, in inner folders too; hidden files and folders (`.`, macOS's `._`) are not.

    The order is that of the composed relative names by code point: the same on every system.
    Raises `UserError` for a folder that is missing, no folder, or without pictures; the recipe names it by `key`.
    """
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "there is no such folder"
        raise UserError(reason, where=folder, fix=f"say where the {what} are: {key}=…")
    names: list[str] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inner = Path(root).relative_to(folder).as_posix()
        names += [f if inner == "." else f"{inner}/{f}" for f in files if not f.startswith(".")]
    if odd := [ascii(name) for name in names if _undecodable(name)]:
        raise UserError(f"has files whose names are not valid Unicode: {', '.join(odd)}", where=folder,
                        fix="rename them")
    names.sort(key=lambda name: (normal(name), name))
    # strings, since a path of each of them takes longer than the disk
    parts = {name: posixpath.splitext(name) for name in names}

    def having(suffixes: Set[str]) -> list[str]:
        return [name for name, (_, suffix) in parts.items() if suffix.lower() in suffixes]

    pictures = having(PICTURE_SUFFIXES)
    beside = {normal(name) for name in pictures} | {normal(parts[name][0]) for name in pictures}
    captions, tables = [], [name for name in names if posixpath.basename(name).lower() in TABLES] + having({".parquet"})
    for name in having(CAPTION_SUFFIXES):
        stem, suffix = parts[name]
        alone = suffix.lower() == ".json" and normal(stem) not in beside
        (tables if alone else captions).append(name)
    masks = [name for name in pictures if normal(parts[name][0]).endswith(MASK_SUFFIX)
             and normal(parts[name][0]).removesuffix(MASK_SUFFIX) in beside]
    apart = set(masks)
    pictures = [name for name in pictures if name not in apart] if masks else pictures
    listing = Listing(folder, pictures, captions, having(OTHER_PICTURE_SUFFIXES), tables, masks)
    if not listing.pictures:
        others = f" ({', '.join(listing.unreadable)} cannot be read)" if listing.unreadable else ""
        raise UserError(f"there are no pictures in this folder{others}", where=folder,
                        fix="put .jpg, .png, .webp, .bmp, .tif, .gif or .avif files there")
    return listing


def located(folder: str) -> Path:
    """The folder of that name, or that of drawn pictures ("mini:mascot")."""
    if not folder.startswith("mini:"):
        return Path(folder)
    from impasto.mini.lessons import lesson_folder  # drawing asks for torch

    return lesson_folder(folder)


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The picture in a file's bytes, not decompressed yet. What goes wrong in the block is a `ValueError`: why not."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > PIXEL_CAP:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError:
        raise ValueError(f"is larger than {PIXEL_CAP // 10**6} megapixels, make it smaller") from None
    except Image.UnidentifiedImageError:
        raise ValueError("is not a picture" if data else "is an empty file") from None
    except DECODE_ERRORS as error:
        raise ValueError(f"is damaged ({error})" if str(error) else "is damaged") from error


def decode(data: bytes, background: str = "white") -> Image.Image:
    """The picture in a file's bytes: RGB, 8 bits, upright by EXIF orientation, the first frame of several.

    Transparent pixels show `background`. Raises `ValueError` that says why not.
    """
    with opened(data) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    return to_rgb(upright, background)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """A decoded picture in RGB of 8 bits, `background` under what is transparent. Raises `ValueError`."""
    if image.mode == "F":
        raise ValueError("holds floating-point numbers, save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("has more than 16 bits a channel, save it with 8")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def survey(listing: Listing, remembered: Remembered, report: Reporter = SILENT,
           title: str = "pictures") -> tuple[list[Picture], list[Problem]]:
    """Decode every picture in full, several at a time; what is good is remembered and not decoded again.

    Returns pictures and problems, both in the listing's order.
    """
    pictures: list[Picture] = []
    problems: list[Problem] = []
    recall = functools.partial(_recall, remembered)
    for name, facts, new in each_picture(listing.files, remembered, recall, _examine, report, title):
        if isinstance(facts, str):
            problems.append(Problem(name, facts))
        else:
            digest, height, width = facts
            pictures.append(Picture(listing.folder / name, name, digest, (height, width)))
            if new:
                _remember(remembered, listing.folder / name, facts)
    return pictures, problems


def each_picture(files: Mapping[str, Path], remembered: Remembered, recall: Callable[[Path], T | None],
                 examine: Callable[[Path], T], report: Reporter, title: str) -> Iterator[tuple[str, T, bool]]:
    """Name, what `recall` knows of a picture or `examine` finds, and whether it is new, in the order of `files`.

    Several are examined at a time. What is remembered by then is saved at the end.
    """
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    with report.phase(f"looking at the {title}", len(files), title) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIXEL_CAP is our own line
        try:
            found = {name: recall(path) for name, path in files.items()}
            waiting = {name: pool.submit(examine, files[name]) for name, known in found.items() if known is None}
            for name, known in found.items():
                yield name, waiting.pop(name).result() if known is None else known, known is None
                advance(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            remembered.save()


def memory_of(folder: Path) -> Remembered:
    """What is remembered of a folder's pictures, in the user's cache directory."""
    return Remembered(cache_dir() / "pictures" / f"{key_of(str(folder.absolute()))}.json")


Facts = tuple[str, int, int]  # digest, upright height and width


def _examine(path: Path) -> Facts | str:
    """What is to be known of a picture, or what is wrong with it."""
    try:
        data = path.read_bytes()
        image = decode(data)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)
    return hashlib.blake2b(data, digest_size=16).hexdigest(), image.height, image.width


def _recall(remembered: Remembered, path: Path) -> Facts | None:
    try:
        facts = remembered.get(path, "picture")
    except OSError:
        return None  # a dangling link: _examine will say so
    if isinstance(facts, list) and len(facts) == 3:
        return str(facts[0]), int(facts[1]), int(facts[2])
    return None


def _remember(remembered: Remembered, path: Path, facts: Facts) -> None:
    if time.time() - path.stat().st_mtime > FRESH_SECONDS:
        remembered.put(path, "picture", list(facts))
