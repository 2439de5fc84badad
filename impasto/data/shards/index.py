"""What is known of a shard, one row a sample: where its picture lies, what it is, its captions, and what is wrong.

An index is one file in safetensors' format beside the cache, a column a tensor. It is mapped, not loaded: a million
samples take address space, not memory. It holds for as long as the shard stays as it is (size, time and inode; on a
server length, ETag and Last-Modified).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from impasto.core.files import atomic_write, key_of

#: raise it when an index tells something else
VERSION = 2
#: members that are captions, by extension; the first ones go before the others
CAPTIONS = ("txt", "caption", "json")


class Status(IntEnum):
    """Whether a sample has a picture that can be used."""

    GOOD = 0
    NO_PICTURE = 1
    BROKEN = 2  # it cannot be decoded
    TWICE = 3  # a sample of this key came before it in the shard
    CUT = 4  # the shard ends in it


_TWICE = int(Status.TWICE)
#: what is wrong with a sample whose key was there before
TWICE = "is there twice in this shard; members of one sample have to stand together (tar --sort=name)"

#: name -> type of a row's value, the widest first: each column is then aligned
COLUMNS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "offset": ("<i8", "I64", ()), "size": ("<i8", "I64", ()),  # of the picture's bytes in the shard
    "end": ("<i8", "I64", ()),  # of the row's text in `text`
    "key_hash": ("<u8", "U64", ()),
    "hash": ("<u8", "U64", ()),  # `picture_hash`; 0 for none
    "height": ("<i4", "I32", ()), "width": ("<i4", "I32", ()),  # upright, in pixels
    "digest": ("u1", "U8", (16,)),  # as `Picture.digest`
    "colours": ("u1", "U8", (48,)),  # `grid_colours`
    "status": ("u1", "U8", ()), "said": ("u1", "U8", ()), "unread": ("u1", "U8", ()),  # bits: CAPTIONS with words, not
}


@dataclass(frozen=True)
class Words:
    """What an index has in words of one sample. `captions`: by kind, its lines joined by line feeds."""

    key: str
    extension: str  # of its picture
    reason: str  # what is wrong with it
    captions: dict[str, str]

    @property
    def name(self) -> str:
        """What the sample is called inside its shard."""
        return f"{self.key}.{self.extension}" if self.extension else self.key


@dataclass(frozen=True)
class Index:
    """One shard's rows, mapped from a file: numpy arrays of (N,), (N, 16) or (N, 48) by the names of `COLUMNS`."""

    columns: dict[str, np.ndarray]
    text: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["status"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def words(self, row: int) -> Words:
        """A sample's words."""
        ends = self.columns["end"]
        raw = self.text[ends.item(row - 1) if row else 0:ends.item(row)].tobytes()
        key, extension, reason, *said = raw.decode("utf-8", "surrogateescape").split("\0")
        reason = TWICE if self.columns["status"].item(row) == _TWICE else reason
        return Words(key, extension, reason, {kind: text for kind, text in zip(CAPTIONS, said, strict=True) if text})


# --- files -------------------------------------------------------------------------------------------------


def save_index(path: Path, columns: Mapping[str, array[int]], text: bytearray, facts: dict[str, Any]) -> None:
    """Write an index atomically: packed values by the names of `COLUMNS`, and the rows' texts one after another.

    Of rows with one key, all but the first are marked as `Status.TWICE`.
    """
    keys, status = (np.frombuffer(columns[name], np.dtype(COLUMNS[name][0])) for name in ("key_hash", "status"))
    again = np.ones(len(keys), bool)
    again[np.unique(keys, return_index=True)[1]] = False
    status[again & (status != Status.CUT)] = Status.TWICE
    hasher = hashlib.blake2b(digest_size=16)
    header, place = dict[str, Any](), 0
    parts: dict[str, memoryview] = {name: memoryview(columns[name]).cast("B") for name in COLUMNS}
    parts["text"] = memoryview(text)
    for name, data in parts.items():
        hasher.update(data)
        kind, shape = ("U8", [len(data)]) if name == "text" else (COLUMNS[name][1], [len(keys), *COLUMNS[name][2]])
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    header["__metadata__"] = {"facts": json.dumps({"version": VERSION, **facts}), "digest": hasher.hexdigest()}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with atomic_write(path) as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for data in parts.values():
            file.write(data)


def open_index(path: Path) -> Index | None:
    """The index in a file, mapped; None where there is none, or another version's, or a damaged one."""
    try:
        mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # a memmap's own slices take far longer
        begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:begin].tobytes())
        facts = json.loads(header["__metadata__"]["facts"])
        if facts["version"] != VERSION:
            return None
        digest = hashlib.blake2b(mapped[begin:].data, digest_size=16).hexdigest()
        if digest != header["__metadata__"]["digest"]:
            return None
        return Index({name: _column(mapped, header[name], begin, np.dtype(kind), shape)
                      for name, (kind, _, shape) in COLUMNS.items()},
                     _column(mapped, header["text"], begin, np.dtype("u1"), ()), facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _column(mapped: np.ndarray, entry: dict[str, Any], begin: int, kind: np.dtype,
            shape: Sequence[int]) -> np.ndarray:
    first, last = entry["data_offsets"]
    return mapped[begin + first:begin + last].view(kind).reshape(-1, *shape)


def index_name(name: str) -> str:
    """What the index of a shard is called."""
    return f"{key_of(name)}.index.safetensors"
