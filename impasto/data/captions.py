"""Captions: a `.txt` file beside each picture, or one caption for all.

A picture without a caption, or a caption without a picture, is an error by name unless the recipe allows it.
"""

from __future__ import annotations

import codecs
from pathlib import Path, PurePosixPath

from impasto.data.dataset import Listing, Problem, normal
from impasto.data.options import DataOptions


def captions(listing: Listing, options: DataOptions) -> tuple[dict[str, str], list[Problem]]:
    """The caption of each picture by the picture's name, and what is wrong with them."""
    if options.caption is not None:
        return dict.fromkeys(listing.pictures, options.caption), []
    texts = {_stem(name): name for name in listing.captions}
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for name in listing.pictures:
        text = texts.get(_stem(name))
        try:
            caption = read_caption(listing.folder / text) if text else ""
        except (OSError, ValueError) as error:
            problems.append(Problem(text or name, f"cannot be read ({error})"))
            continue
        if not caption and options.missing_captions == "error":
            beside = PurePosixPath(name).with_suffix(".txt").name
            reason = f"its caption {text} is empty" if text else f"has no caption ({beside})"
            problems.append(Problem(name, reason))
        found[name] = caption
    pictures = {_stem(name) for name in listing.pictures}
    unreadable = {_stem(name) for name in listing.unreadable}
    problems += [Problem(text, "is a caption of a picture that cannot be read here" if stem in unreadable
                         else "is a caption without a picture")
                 for stem, text in texts.items() if stem not in pictures]
    return found, problems


def read_caption(path: Path) -> str:
    """The text in a file, its lines joined by single spaces.

    UTF-8 with or without a byte-order mark, or UTF-16 with one (Windows' Notepad). Raises `ValueError`.
    """
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _stem(name: str) -> str:
    """What a picture and its caption have in common."""
    return normal(PurePosixPath(name).with_suffix("").as_posix())
