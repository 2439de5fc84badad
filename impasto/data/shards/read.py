"""Reading a shard once, from its first byte to its last: its samples, every picture decoded in full, into an index."""

from __future__ import annotations

import hashlib
import os
import warnings
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from impasto.core.errors import UserError
from impasto.core.progress import Advance
from impasto.data.caption_files import lines_of, text_in
from impasto.data.dataset import OTHER_PICTURE_SUFFIXES, PICTURE_SUFFIXES, decode
from impasto.data.shards.access import Shard
from impasto.data.shards.index import CAPTIONS, COLUMNS, Status, save_index
from impasto.data.shards.tar import CutShort, Member, members
from impasto.data.similar import grid_colours, picture_hash

#: members that are larger are not read, bytes
LARGEST_PICTURE, LARGEST_CAPTION = 1 << 29, 1 << 24
#: larger pictures are averaged down to a shorter side of about so many pixels before their hash is taken
SMALL = 256
#: pictures that are decoded at once, and that wait for it
THREADS, WAITING = 4, 32

_SUFFIXES = {suffix[1:] for suffix in PICTURE_SUFFIXES}
_OTHERS = {suffix[1:] for suffix in OTHER_PICTURE_SUFFIXES}
#: array's letters for COLUMNS' types
_CODES = {"<i8": "q", "<u8": "Q", "<i4": "i", "u1": "B"}


class Facts(NamedTuple):
    """What a row says of a picture that can be decoded, by the names of `COLUMNS`."""

    digest: bytes = bytes(16)
    height: int = 0
    width: int = 0
    hash: int = 0
    colours: bytes = bytes(48)


def read_shard(shard: Shard, advance: Advance, path: Path, stamp: list[object] | None) -> None:
    """Read a shard once, decode every picture in full, and write its index to `path`.

    What is wrong with a sample is in its row. Raises `UserError` for what is no shard or cannot be read.
    """
    rows = _Rows()
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="shards")
    waiting: deque[tuple[_Sample, Future[Facts | str] | None]] = deque()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIXEL_CAP is our own line
        try:
            for sample in _samples(shard):
                data, sample.data = sample.data, b""
                waiting.append((sample, pool.submit(_examined, data) if sample.status is Status.GOOD else None))
                if len(waiting) >= WAITING:
                    rows.take(*waiting.popleft())
                    advance(1)
            while waiting:
                rows.take(*waiting.popleft())
                advance(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    save_index(path, rows.columns, rows.text, {"shard": shard.shown, "stamp": stamp})


@dataclass
class _Sample:
    """What is gathered of one sample while its members go by."""

    key: str
    extension: str = ""
    offset: int = 0
    data: bytes = b""
    size: int = 0
    status: Status = Status.GOOD
    reason: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)  # extensions that are neither


def _samples(shard: Shard) -> Iterator[_Sample]:
    """Members that stand together and have one key, as webdataset takes them: "a/b.c.jpg" has the key "a/b"."""
    current: _Sample | None = None
    try:
        with shard.stream() as read:
            for member in members(read, _is_wanted):
                key, extension = split(member.name)
                if not key:
                    continue
                if current is None or key != current.key:
                    if current is not None:
                        yield _finished(current)
                    current = _Sample(key)
                _take(current, member, extension)
    except CutShort as cut:
        key = split(cut.name)[0]
        whole = not key or (current is not None and key != current.key)
        if current is not None and whole:
            yield _finished(current)
        told = "the shard is cut short " + (f"here: {cut.reason}" if key else f"after this sample: {cut.reason}")
        yield _Sample(key or (current.key if current is not None else ""), status=Status.CUT, reason=told)
        return
    except ValueError as error:
        raise UserError(str(error), where=shard.shown, fix="make it again, or take it out of data.shards") from None
    if current is not None:
        yield _finished(current)


def split(name: str) -> tuple[str, str]:
    """Key and extension of a member: up to the first dot of its file name, and what follows, in lower case.

    "" and "" for hidden files and those without an extension.
    """
    folder, slash, file = name.removeprefix("./").rpartition("/")
    base, _, extension = file.partition(".")
    return (f"{folder}{slash}{base}", extension.lower()) if base and extension else ("", "")


def _is_wanted(name: str, size: int) -> bool:
    extension = split(name)[1]
    return extension.rpartition(".")[2] in _SUFFIXES and size <= LARGEST_PICTURE or \
        extension in CAPTIONS and size <= LARGEST_CAPTION


def _take(sample: _Sample, member: Member, extension: str) -> None:
    if extension in _SUFFIXES:
        if sample.extension:
            sample.status, sample.reason = Status.NO_PICTURE, f"has two pictures, .{sample.extension} and .{extension}"
            return
        sample.extension, sample.offset, sample.size = extension, member.offset, member.size
        if member.data is None:
            sample.status, sample.reason = Status.BROKEN, f"is larger than {LARGEST_PICTURE >> 20} MiB"
        else:
            sample.data = member.data
    elif extension in CAPTIONS:
        try:
            if member.data is None:
                raise ValueError(f"is larger than {LARGEST_CAPTION >> 20} MiB")
            lines = lines_of(text_in(member.data), extension == "json")
            sample.captions[extension] = "\n".join(lines).replace("\0", " ")
        except ValueError as error:
            sample.unread.add(extension)
            sample.reason = sample.reason or f"its caption .{extension} cannot be read ({error})"
    else:
        sample.others.append(extension)


def _finished(sample: _Sample) -> _Sample:
    """The sample when its last member has gone by."""
    if not sample.extension and sample.status is Status.GOOD:
        kinds = [each for each in sample.others if each.rpartition(".")[2] in _OTHERS]
        held = ", ".join(f".{each}" for each in [*sample.captions, *sample.others]) or "nothing"
        sample.status = Status.NO_PICTURE
        sample.reason = f"has a picture of a kind that is not read here (.{kinds[0]})" if kinds else \
            f"has no picture, only {held}"
    return sample


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _examined(data: bytes) -> Facts | str:
    """What there is to know of a picture, or what is wrong with it."""
    try:
        image = decode(data)
    except ValueError as error:
        return str(error)
    factor = min(image.size) // SMALL
    small = image.reduce(factor) if factor > 1 else image
    return Facts(hashlib.blake2b(data, digest_size=16).digest(), image.height, image.width, picture_hash(small) or 0,
                 grid_colours(small))


class _Rows:
    """The rows of one shard while it is read, packed as they will lie in the file."""

    def __init__(self) -> None:
        self.columns = {name: array(_CODES[kind]) for name, (kind, _, _) in COLUMNS.items()}
        self.text = bytearray()

    def take(self, sample: _Sample, examined: Future[Facts | str] | None) -> None:
        """One more row."""
        found = None if examined is None else examined.result()
        if isinstance(found, str):
            sample.status, sample.reason = Status.BROKEN, found
        facts = found if isinstance(found, Facts) else Facts()
        words = [sample.key, sample.extension, sample.reason.replace("\0", " "),
                 *(sample.captions.get(kind, "") for kind in CAPTIONS)]
        self.text += "\0".join(words).encode("utf-8", "surrogateescape")
        said = sum(1 << i for i, kind in enumerate(CAPTIONS) if sample.captions.get(kind))
        unread = sum(1 << i for i, kind in enumerate(CAPTIONS) if kind in sample.unread)
        row = {"offset": sample.offset, "size": sample.size, "end": len(self.text), "key_hash": _key_hash(sample.key),
               "status": sample.status, "said": said, "unread": unread, **facts._asdict()}
        for name, value in row.items():
            if isinstance(value, bytes):
                self.columns[name].frombytes(value)
            else:
                self.columns[name].append(value)
