"""The members of a tar file, read from its first byte to its last: names, and where their bytes lie.

A stream is enough, so that a shard on a server is read as one on a disk; nothing is ever unpacked to a file. What
other programs write is read: ustar, GNU's long names, pax headers (Python's tarfile and webdataset write them).
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: bytes of a header, and what members are padded to
BLOCK = 512
#: bytes that are passed over at once
PIECE = 1 << 20
#: a header that describes the next member is not larger, bytes
LARGEST_NOTE = 1 << 20

#: the next n bytes of a stream; fewer only where it ends
Read = Callable[[int], bytes]


@dataclass(frozen=True)
class Member:
    """One file in a tar: its bytes are `size` ones at `offset`, and `data` where they were asked for."""

    name: str
    offset: int
    size: int
    data: bytes | None


class CutShort(Exception):
    """A tar that ends before its end. `name`: the member that is not whole, or "" where none is begun."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(reason)


def members(read: Read, wanted: Callable[[str, int], bool]) -> Iterator[Member]:
    """All regular files of a tar, in order; `wanted(name, size)` says whose bytes are kept.

    Raises `CutShort` where it ends too early, and `ValueError` that says why for what is no tar.
    """
    position, notes = 0, dict[str, str]()
    lasting = dict[str, str]()  # pax notes on all that follows
    while True:
        header = _header(read(BLOCK), position)
        position += BLOCK
        if header is None:
            return
        size = _size(notes, lasting, header.size)
        name = notes.get("path") or lasting.get("path") or header.name
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            if header.size > LARGEST_NOTE:
                raise ValueError(f"is damaged at byte {position - BLOCK:,}")
            data = _whole(read, header.size, header.name)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                notes["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                (lasting if header.type == tarfile.XGLTYPE else notes).update(_pax(data))
            position += _padded(header.size)
            continue
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in notes):
            raise ValueError(f"holds {name} as a sparse file, make the shard again without --sparse")
        if not header.isreg():  # folders and links have no bytes of their own
            if header.type not in tarfile.SUPPORTED_TYPES or header.type == tarfile.GNUTYPE_LONGLINK:
                _whole(read, header.size, name, keep=False)
                position += _padded(header.size)
            notes = notes if header.type == tarfile.GNUTYPE_LONGLINK else {}
            continue
        data = _whole(read, size, name, keep=wanted(name, size))
        yield Member(name, position, size, data if wanted(name, size) else None)
        position += _padded(size)
        notes = {}


def _header(block: bytes, position: int) -> tarfile.TarInfo | None:
    """The header in a block, None for the end marker."""
    if position == 0 and block[:2] == b"\x1f\x8b":
        raise ValueError("is compressed, and samples inside it cannot be found: unpack it with gunzip")
    if len(block) < BLOCK:
        if position == 0:
            raise ValueError("is an empty file" if not block else "is no tar file")
        raise CutShort("", "tar's end marker is missing")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        if not block.strip(b"\0"):
            return None
        raise ValueError("is no tar file" if position == 0 else f"is damaged at byte {position:,}") from None


def _whole(read: Read, size: int, name: str, *, keep: bool = True) -> bytes:
    """A member's bytes, and its padding passed over; b"" unless they are kept."""
    if keep:
        data = read(size)
        missing = size - len(data)
        rest = _padded(size) - size
    else:
        data, missing, rest = b"", 0, _padded(size)
    while rest and not missing:
        piece = read(min(rest, PIECE))
        if not piece:
            missing = max(1, rest - (_padded(size) - size)) if not keep else 1
            break
        rest -= len(piece)
    if missing:
        raise CutShort(name, f"{missing:,} byte{'s' * (missing != 1)} of {name} are missing")
    return data


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _size(notes: dict[str, str], lasting: dict[str, str], plain: int) -> int:
    told = notes.get("size", lasting.get("size"))
    if told is None:
        return plain
    if not told.isdigit():
        raise ValueError(f"is damaged: a member has the size {told!r}")
    return int(told)


def _pax(data: bytes) -> dict[str, str]:
    """The records of a pax header, "length key=value\\n" each."""
    found = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(data):
            raise ValueError("is damaged: a pax header cannot be read")
        key, _, value = data[len(length) + 1:int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length):]
    return found
