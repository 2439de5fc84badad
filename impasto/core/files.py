"""Files that are whole or absent: atomic writes, digests remembered by (size, time, inode), locks."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

from impasto.core.errors import UserError


def cache_dir() -> Path:
    """The user's cache directory for Impasto (`IMPASTO_CACHE` overrides the platform's own)."""
    if chosen := os.environ.get("IMPASTO_CACHE"):
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "impasto"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "impasto"


def no_such_file(path: Path | str, what: str = "file") -> UserError:
    """The error about a path at which nothing is.

    What to do names the first folder of the path that is missing, or what lies beside it by nearly that name.
    """
    path = Path(path)
    for parent in reversed(path.parents):
        if not parent.is_dir():
            return UserError(f"no such {what}", where=path, fix=f"there is no folder {parent}")
    try:
        close = difflib.get_close_matches(path.name, (each.name for each in path.parent.iterdir()), n=1, cutoff=0.75)
    except OSError:
        close = []
    fix = f"did you mean {close[0]!r}?" if close else f"looked for in {path.parent.resolve()}"
    return UserError(f"no such {what}", where=path, fix=fix)


def _sync_directory(folder: Path) -> None:
    """Make a rename durable. Windows cannot open a directory and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` whole, when the block ends without an error, or not at all.

    Temporary file in the same folder, fsync, `os.replace`. A full disk, or a place that cannot be written, is a
    `UserError`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's own mode hides the file from everyone else
        os.replace(name, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        Path(name).unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_folder(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """A new folder that appears at `path` whole: written as `path.part`, synced, then renamed.

    `path` must not exist: a folder that is not empty cannot be replaced atomically. With `replace` one that is there
    is moved away just before, and a kill between the two leaves none.
    """
    path = Path(path)
    part, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for file in sorted(part.rglob("*")):
            if file.is_file():
                os.chmod(file, 0o666 & ~_umask())  # safetensors' own mode hides the file from everyone else
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        if replace and path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(part, path)
        _sync_directory(path.parent)
        if replace:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def disk_error(error: OSError, path: Path) -> UserError:
    """The one line for a write that failed: full disk, no permission, or what the system said."""
    free = shutil.disk_usage(nearest_folder(path)).free
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return UserError(f"the disk is full ({free / 2**20:.0f} MiB free)", where=path,
                         fix="free some space and run the same command again; nothing was half-written")
    return UserError(f"cannot be written ({error.strerror or error})", where=path,
                     fix="choose another place or change the permissions")


def require_space(path: Path | str, wanted: int, what: str) -> None:
    """Raise a `UserError` if fewer than `wanted` bytes are free where `path` is or will be."""
    free = shutil.disk_usage(nearest_folder(Path(path))).free
    if free < wanted:
        raise UserError(f"{what} takes {wanted / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free", where=path,
                        fix="free some space and run the same command again; nothing was half-written")


def nearest_folder(path: Path) -> Path:
    """The closest ancestor of `path` that exists."""
    path = Path(path).absolute()
    while not path.is_dir():
        path = path.parent
    return path


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def digest(path: Path | str) -> str:
    """blake2b-128 of a file's bytes, in hex."""
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def key_of(*facts: object) -> str:
    """blake2b-160 of the facts' written form, in hex."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=20).hexdigest()


class Remembered:
    """A small store of facts about files, forgotten when the file's size, time or inode changes.

    Kept as one JSON file; written atomically by `save`. Used so that a picture or a checkpoint is
    hashed once and not at every start.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.changed = False
        try:
            self.facts: dict[str, dict] = json.loads(store.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.facts = {}  # a lost or damaged memory costs time, never correctness

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        info = path.stat()
        return [info.st_size, info.st_mtime_ns, info.st_ino]

    def get(self, path: Path, kind: str) -> object | None:
        """The remembered fact `kind` about `path`, or None."""
        entry = self.facts.get(str(path.absolute()))
        if entry is None or entry["stamp"] != self._stamp(path):
            return None
        return entry.get(kind)

    def put(self, path: Path, kind: str, value: object) -> None:
        """Remember a JSON-able fact about `path` as it is now."""
        key, stamp = str(path.absolute()), self._stamp(path)
        if self.facts.get(key, {}).get("stamp") != stamp:
            self.facts[key] = {"stamp": stamp}
        self.facts[key][kind] = value
        self.changed = True

    def save(self) -> None:
        """Write the store, if anything was added."""
        if self.changed:
            write_json(self.store, self.facts)
            self.changed = False


@contextlib.contextmanager
def locked(path: Path, *, doing: str, fix: str = "wait for it, or choose another output.dir",
           patience: float = 0) -> Iterator[None]:
    """Hold the lock file `path`, or raise a `UserError` that names its holder (process id and host).

    `patience`: seconds to wait for it. Where nobody does, a folder made for the lock goes again if the block fails with
    nothing else in it.
    """
    import socket

    lock = filelock.FileLock(path)
    holder = path.with_suffix(".holder")
    new = [folder for folder in path.parents if not folder.exists()] if not patience else []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience)
    except filelock.Timeout:
        who = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
        raise UserError(f"{who} is already {doing}", where=path.parent, fix=fix) from None
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        except OSError as error:
            raise disk_error(error, path) from error
        yield
        new = []
    finally:
        holder.unlink(missing_ok=True)
        if new and [*path.parent.iterdir()] == [path]:
            with contextlib.suppress(OSError):  # Windows lets no open file go, and its own release does
                path.unlink()
        lock.release()
        for folder in new:
            with contextlib.suppress(OSError):  # something lies in it
                folder.rmdir()
