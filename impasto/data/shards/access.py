"""Where shards are, and how their bytes are reached: files by position, web servers by Range.

A server that knows no Range has its shard fetched whole into the cache, once.
"""

from __future__ import annotations

import glob
import os
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from impasto.core.errors import UserError
from impasto.core.files import atomic_write, key_of, locked, require_space
from impasto.core.progress import SILENT, Reporter
from impasto.data.dataset import FRESH_SECONDS
from impasto.data.shards.http import About, HttpFile
from impasto.data.shards.pool import Pool
from impasto.data.shards.tar import Read

#: {0000..0099}, and {train,val}
_NUMBERS, _CHOICES = re.compile(r"\{(\d+)\.\.(\d+)\}"), re.compile(r"\{([^{}]*,[^{}]*)\}")
#: a pattern stands for so many shards at most
MOST = 1_000_000
#: bytes of a shard that are fetched at once
PIECE = 1 << 20
#: seconds that a process waits while another fetches a shard
FETCHING = 24 * 3600.0


class _Descriptor:
    """An open file, by its number."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def close(self) -> None:
        os.close(self.number)

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes only at the end."""
        parts = []
        while size:
            if hasattr(os, "pread"):
                part = os.pread(self.number, size, offset)
            else:  # Windows; the file is ours alone while it is taken
                os.lseek(self.number, offset, os.SEEK_SET)
                part = os.read(self.number, size)
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


_FILES: Pool[_Descriptor] = Pool(64)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`, fewer at its end; the file stays open for the next ones. Raises `OSError`.

    A file that is replaced goes on being read as it was: what is read has its digest checked.
    """
    with _FILES.taken(str(path), lambda: _Descriptor(path)) as file:
        return file.read(offset, size)


class Shard(ABC):
    """One tar file. `name` is its path or URL, which is what it is remembered by; `label` its short name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = name  # in messages
        self.label = PurePosixPath(unquote(urlsplit(name).path)).name if is_url(name) else Path(name).name

    @abstractmethod
    def stamp(self) -> list[object] | None:
        """What changes with its bytes; None where nothing does for sure. Raises `UserError` where it is not there."""

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where it ends. Raises `UserError`."""

    @abstractmethod
    def stream(self) -> AbstractContextManager[Read]:
        """All of it from the first byte on, while the context is open. Raises `UserError`."""


class LocalShard(Shard):
    """A shard on a disk; or the copy of one on a server, of which `about` is known."""

    def __init__(self, path: Path, name: str | None = None, about: About | None = None) -> None:
        super().__init__(str(path.absolute()) if name is None else name)
        self.path, self.about = path, about
        self.shown = str(path) if name is None else HttpFile(name).shown

    def stamp(self) -> list[object] | None:
        if self.about is not None:
            return self.about.stamp
        try:
            info = self.path.stat()
        except OSError as error:
            raise self._error(error) from error
        # a file that has just been written may change again without a new time stamp
        fresh = time.time() - info.st_mtime <= FRESH_SECONDS
        return None if fresh else [info.st_size, info.st_mtime_ns, info.st_ino]

    def read(self, offset: int, size: int) -> bytes:
        try:
            return read_at(self.path, offset, size)
        except OSError as error:
            raise self._error(error) from error

    @contextmanager
    def stream(self) -> Iterator[Read]:
        try:
            with open(self.path, "rb") as file:
                yield file.read
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError("there is no such shard", where=self.shown, fix="say where the shards are: data.shards=…")
        return UserError(f"cannot be read ({error.strerror or error})", where=self.shown)


class HttpShard(Shard):
    """A shard on a server that knows Range."""

    def __init__(self, file: HttpFile, about: About) -> None:
        super().__init__(file.url)
        self.file, self.about = file, about
        self.shown = self.file.shown

    def stamp(self) -> list[object] | None:
        return self.about.stamp

    def read(self, offset: int, size: int) -> bytes:
        return self.file.read(offset, size)

    @contextmanager
    def stream(self) -> Iterator[Read]:
        with self.file.stream(ranges=True) as stream:
            yield stream.read


# --- finding them ------------------------------------------------------------------------------------------


def is_url(name: str) -> bool:
    """Whether it is on a web server."""
    return name.lower().startswith(("http://", "https://"))


def expanded(patterns: Sequence[str]) -> list[str]:
    """The shards that patterns stand for, in their order: {0000..0099}, {a,b}, and for files * ? [ ] and folders.

    Raises `UserError` for a pattern that finds nothing, and for a shard that is named twice.
    """
    names: list[str] = []
    for pattern in patterns:
        found = [name for braced in _braces(pattern) for name in _found(braced)]
        if len(names) + len(found) > MOST:
            raise UserError(f"stands for more than {MOST:,} shards", where=pattern)
        names += found
    twice = [name for name, count in Counter(_same(name) for name in names).items() if count > 1]
    if twice:
        raise UserError("is named twice", where=twice[0], fix="name each shard once in data.shards")
    return names


def _same(name: str) -> str:
    return name if is_url(name) else str(Path(name).absolute())


def _braces(pattern: str) -> Iterator[str]:
    numbers, choices = _NUMBERS.search(pattern), _CHOICES.search(pattern)
    first = min((match for match in (numbers, choices) if match), key=lambda match: match.start(), default=None)
    if first is None:
        yield pattern
        return
    if first is numbers:
        low, high = first.groups()
        if int(high) < int(low) or int(high) - int(low) >= MOST:
            raise UserError(f"{first.group()} is no range of at most {MOST:,} numbers, such as {{0000..0099}}",
                            where=pattern)
        values: Iterator[str] = (f"{value:0{len(low)}d}" for value in range(int(low), int(high) + 1))
    else:
        values = iter(first.group(1).split(","))
    for value in values:
        yield from _braces(pattern[:first.start()] + value + pattern[first.end():])


def _found(name: str) -> list[str]:
    """The shards of one name without braces."""
    if is_url(name):
        return [name]
    if "://" in name or name.startswith("pipe:"):
        raise UserError("is neither a file nor a web address", where=name, fix="name files, or http:// or https://")
    path = Path(name)
    if path.is_file():
        return [name]
    if path.is_dir():
        return _some(sorted(str(file) for file in path.glob("*.tar")), name, "this folder has no .tar files")
    if glob.has_magic(name):
        return _some(sorted(glob.glob(name, recursive=True)), name, "no file is called so")
    return _some([], name, "there is no such shard")


def _some(found: list[str], name: str, otherwise: str) -> list[str]:
    if not found:
        raise UserError(otherwise, where=name, fix="say where the shards are: data.shards=…")
    return found


def reached(name: str, folder: Path, report: Reporter = SILENT) -> Shard:
    """A shard by its name; one on a server without Range is fetched into `folder` first, unless it is there.

    Raises `UserError` where it is not there or the server does not answer.
    """
    if not is_url(name):
        return LocalShard(Path(name))
    file = HttpFile(name)
    about = file.about()
    if about.ranges:
        return HttpShard(file, about)
    return LocalShard(_fetched(file, about, folder, report), name, about)


def _fetched(file: HttpFile, about: About, folder: Path, report: Reporter) -> Path:
    """The copy of a shard, which lies there once, whatever process fetched it."""
    path = folder / f"{key_of(file.url, about.stamp, about.length)}.tar"
    with locked(path.with_suffix(".lock"), doing="fetching this shard", patience=FETCHING,
                fix="wait for it"):
        if path.exists() and about.stamp is not None:
            return path
        report.note(f"{file.shown} is fetched whole into {folder}, since its server gives no parts of files (Range)")
        if about.length is not None:
            require_space(path, about.length, "this shard")
        with file.stream(ranges=False) as stream, atomic_write(path) as copy:
            fetched = 0
            for piece in iter(lambda: stream.read(PIECE), b""):
                copy.write(piece)
                fetched += len(piece)
            if about.length is not None and fetched != about.length:
                raise UserError(f"{fetched:,} of {about.length:,} bytes came", where=file.shown,
                                fix="run the same command again")
    return path


def labels(names: Sequence[Shard]) -> list[str]:
    """What shards are called in samples' names: the file's own, or all of it where two are the same."""
    counts = Counter(shard.label for shard in names)
    return [shard.label if counts[shard.label] == 1 else shard.shown for shard in names]
