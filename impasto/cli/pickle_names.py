"""Which classes and functions a pickle names, read off its opcodes. Nothing is built, nothing is run."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO

#: how files begin that are pickles, or archives that torch puts one in
BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

#: torch's old format is several pickles back to back: a number, a version, the system, the object, the storages
_MOST_PICKLES = 5
#: bytes of a pickle that are looked at; the tensors lie elsewhere
_MOST_BYTES = 2**28


def names(path: Path) -> list[str]:
    """`module.name` of all that the pickles in a file name, sorted; "?" where a name is made up on the way."""
    found: set[str] = set()
    for stream in _pickles(path):
        for _ in range(_MOST_PICKLES):
            try:
                found |= _named(stream)
            except (ValueError, EOFError, IndexError, UnicodeError):  # the end of the pickles, or damage
                break
    return sorted(found)


def _pickles(path: Path) -> list[IO[bytes]]:
    """The pickles inside an archive, or the file itself."""
    if not zipfile.is_zipfile(path):
        return [io.BytesIO(_start(path))]
    try:
        with zipfile.ZipFile(path) as archive:
            return [io.BytesIO(archive.open(entry).read(_MOST_BYTES)) for entry in archive.infolist()
                    if entry.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError):  # damaged, encrypted, unknown packing
        return []


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_MOST_BYTES)


def _named(stream: IO[bytes]) -> set[str]:
    """The names in one pickle, up to its STOP."""
    found: set[str] = set()
    pushed: list[str] = []  # what the last opcodes put on the stack: a string, or "?"
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(str(argument).replace(" ", "."))
            pushed.append("?")
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(pushed[-2:]) if len(pushed) > 1 else "?")
            pushed.append("?")
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = pushed[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed.append(memo.get(int(str(argument)), "?"))
        elif opcode.stack_after:
            pushed.append(argument if isinstance(argument, str) else "?")
    return found
