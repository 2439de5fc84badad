"""The files that hold captions, one kind a function: text, JSON beside a picture, and tables of many pictures.

What is wrong with a file is a `ValueError` that says so.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impasto.core.errors import MissingExtra

#: keys of a row that hold what a picture is called, and what it shows
NAMES, WORDS, TAGS = ("file_name", "image", "path"), ("caption", "text", "prompt"), "tags"
#: key of a row that holds what the picture's loss weighs
WEIGHT = "loss_weight"
#: a table is not larger, bytes
LARGEST = 2 * 10**9


@dataclass(frozen=True)
class Row:
    """One row of a table: the picture's name as it stands there, its lines of text, and where it is."""

    name: str
    lines: list[str]
    place: str  # "line 3"
    weight: object = None  # of the picture's loss, as it stands there


def text_of(path: Path) -> str:
    """A file's text, as `text_in` reads it."""
    return text_in(path.read_bytes())


def text_in(data: bytes) -> str:
    """The text in a file's bytes: UTF-8 with or without a byte-order mark, or UTF-16 with one (Windows' Notepad)."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def tidy(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_lines(path: Path) -> list[str]:
    """The lines of a caption's own file: text, or JSON (a string, or an object as `lines_in` takes it)."""
    return lines_of(text_of(path), path.suffix.lower() == ".json")


def weight_beside(path: Path) -> object:
    """What a picture's own JSON says of its loss's weight, as it stands there. Raises `ValueError`, as `read_lines`."""
    data = _json(text_of(path)) if path.suffix.lower() == ".json" else None
    return data.get(WEIGHT) if isinstance(data, dict) else None


def loss_weight(value: object) -> float | None:
    """The number that it stands for, also as a text (CSV has nothing else); None for nothing at all.

    Raises `ValueError` for what is no number, not finite or negative.
    """
    if value is None or value == "":
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} is not a number of 0 or more")
    return number


def lines_of(text: str, is_json: bool) -> list[str]:
    """The lines of a caption's text, or of the JSON in it."""
    if not is_json:
        return tidy(text)
    data = _json(text)
    if isinstance(data, str):
        return tidy(data)
    if not isinstance(data, dict):
        raise ValueError("is neither a text nor an object with one of caption, text, prompt, tags")
    return lines_in(data)


def lines_in(row: Mapping[str, Any]) -> list[str]:
    """The lines of text in a row: its caption, text or prompt, then its tags behind each (kohya's practice).

    A list of captions is several lines; a list of tags is one, with commas.
    """
    words = next((lines for key in WORDS if (lines := _lines(row.get(key), key))), [])
    tags = row.get(TAGS)
    if isinstance(tags, list):
        tags = ", ".join(str(tag).strip() for tag in tags if str(tag).strip())
    told = _lines(tags, TAGS)
    if not words or not told:
        return words or told
    return [f"{line.rstrip(', ')}, {' '.join(told)}" for line in words]


def _lines(value: Any, key: str) -> list[str]:
    if value is None:
        return []
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"its {key} is no text")
    return [line for part in parts for line in tidy(part)]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON at line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("is no JSON that can be read: it is nested too deep") from None


# --- tables ------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[Row]:
    """The rows of a table: metadata.jsonl, metadata.csv, .parquet, or kohya's merged .json."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"is larger than {LARGEST // 10**9} GB")
    return _READERS[path.suffix.lower()](path)


def is_merged(path: Path) -> bool:
    """Whether a .json file is kohya's: an object of pictures' names with an object for each."""
    try:
        data = _json(text_of(path))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and bool(data) and all(isinstance(row, dict) for row in data.values()) \
        and any(key in row for row in data.values() for key in (*WORDS, TAGS, WEIGHT))


def _jsonl(path: Path) -> list[Row]:
    numbered = ((i, line) for i, line in enumerate(text_of(path).split("\n"), 1) if line.strip())
    return list(_rows(((f"line {i}", _parsed(line, i)) for i, line in numbered)))


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"line {number} is no JSON") from None


def _csv(path: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True)
    try:
        _has_names(reader.fieldnames or [])
        return list(_rows((f"line {reader.line_num}", row) for row in reader))
    except csv.Error as error:
        raise ValueError(f"is no CSV at line {reader.line_num}: {error}") from None


def _merged(path: Path) -> list[Row]:
    rows = []
    for name, row in _json(text_of(path)).items():
        try:
            rows.append(Row(name, lines_in(row), f"key {name}", row.get(WEIGHT)))
        except ValueError as error:
            raise ValueError(f"key {name}: {error}") from None
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(str(MissingExtra("pyarrow", "parquet"))) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in (*NAMES, *WORDS, TAGS, WEIGHT)]
            _has_names(columns)
            table = file.read(columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"is no parquet that can be read: {error}") from None
    return list(_rows((f"row {i}", row) for i, row in enumerate(table, 1)))


def _has_names(columns: Iterable[str]) -> None:
    columns = list(columns)
    if not set(NAMES) & set(columns):
        raise ValueError("has no column file_name")
    if not {*WORDS, TAGS, WEIGHT} & set(columns):
        raise ValueError(f"has no column {', '.join(WORDS)} or {TAGS}")


def _rows(rows: Iterable[tuple[str, Any]]) -> Iterator[Row]:
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no object")
        name = next((row[key] for key in NAMES if isinstance(row.get(key), str) and row[key]), None)
        if name is None:
            raise ValueError(f"{place} has no file_name")
        try:
            yield Row(name, lines_in(row), place, row.get(WEIGHT))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".json": _merged, ".parquet": _parquet}
