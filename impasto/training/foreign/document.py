"""A file of another trainer's, read as text and parsed as what it is; and what a trainer is to the importer."""

from __future__ import annotations

import abc
import codecs
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from impasto.core.errors import UserError
from impasto.core.files import no_such_file
from impasto.training.foreign.engine import Imported

#: settings are not larger, bytes
LARGEST = 4_000_000


@dataclass(frozen=True)
class Document:
    """A file's text, and what JSON or TOML makes of it; None where it is neither."""

    path: Path
    text: str
    data: Any = None


class Source(abc.ABC):
    """A trainer whose settings can be read. A new one is one file and one line in the registry."""

    title: ClassVar[str]

    @abc.abstractmethod
    def claims(self, document: Document) -> bool:
        """Whether a file is this trainer's."""

    @abc.abstractmethod
    def translate(self, documents: Sequence[Document]) -> Imported:
        """The recipe in files that are all claimed, and what became of each key."""


def can_be_seen(path: Path, *, folder: bool = False) -> bool:
    """Whether a path that a foreign file names is here; one that no system can have is not."""
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):
        return False


def lines_of(path: Path, largest: int) -> list[str]:
    """The lines of a text file that a foreign file names, but for empty ones; none where it is not to be read."""
    try:
        if not can_be_seen(path) or path.stat().st_size > largest:
            return []
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        return []


def read_document(path: Path) -> Document:
    """The document at `path`. Raises `UserError` for what is no text, or too large to be settings."""
    if not can_be_seen(path):
        raise no_such_file(path)
    try:
        if path.stat().st_size > LARGEST:
            raise UserError("is too large for settings", where=path, fix="is it a checkpoint? See impasto inspect")
        raw = path.read_bytes()
        utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("is no text", where=path, fix="is it a checkpoint or a picture? See impasto inspect") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from None
    if "\0" in text:
        raise UserError("is no text", where=path, fix="is it a checkpoint or a picture? See impasto inspect")
    return Document(path, text.replace("\r\n", "\n").replace("\r", "\n"), parsed(text))


def parsed(text: str) -> Any:
    """What JSON or TOML makes of a text, or None."""
    for parse in (json.loads, tomllib.loads):
        try:
            return parse(text)
        except (ValueError, RecursionError):
            continue
    return None
