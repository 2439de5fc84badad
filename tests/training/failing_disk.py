"""A disk that fails: from some moment on, whatever would be written below a folder is an error of the system's."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from impasto.formats import written


class Disk:
    """Counts what is made, written, synced and renamed below `root`; the `breaks`-th and all after it fail."""

    def __init__(self, root: Path, number: int, breaks: int | None = None) -> None:
        self.root, self.number, self.breaks = str(root), number, breaks
        self.moments: list[str] = []

    def touch(self, what: str, path: object) -> None:
        """One more moment; it may be the one, or after it."""
        if not str(path).startswith(self.root):
            return
        self.moments.append(f"{what} {str(path)[len(self.root):]}")
        if self.failing:
            raise OSError(self.number, os.strerror(self.number))

    @property
    def failing(self) -> bool:
        return self.breaks is not None and len(self.moments) > self.breaks

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Disk]:
        """All of Python's own ways to the disk lead here, and safetensors' one."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._before(name, getattr(os, name), lambda old, new: new))
            patch.setattr(os, "mkdir", self._before("mkdir", os.mkdir, lambda path, *_: path))
            patch.setattr(os, "fsync", self._before("fsync", os.fsync, _path_of))
            patch.setattr(os, "open", self._opened(os.open))
            patch.setattr(os, "fdopen", self._file(os.fdopen, _path_of))
            for module in (builtins, io):
                patch.setattr(module, "open", self._file(io.open, str))
            patch.setattr(written, "save_file", self._save_file(written.save_file))
            yield self

    def _before(self, what: str, plain: Callable[..., Any], where: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **keywords: Any) -> Any:
            self.touch(what, where(*arguments))
            return plain(*arguments, **keywords)

        return act

    def _opened(self, plain: Callable[..., int]) -> Callable[..., int]:
        def act(path: Any, flags: int, *rest: Any, **keywords: Any) -> int:
            if flags & os.O_CREAT:
                self.touch("create", path)
            return plain(path, flags, *rest, **keywords)

        return act

    def _file(self, plain: Callable[..., Any], where: Callable[[Any], str]) -> Callable[..., Any]:
        def act(file: Any, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
            opened = plain(file, mode, *rest, **keywords)
            if not set(mode) & set("wax"):
                return opened
            return File(opened, self, where(file))

        return act

    def _save_file(self, plain: Callable[..., None]) -> Callable[..., None]:
        def act(tensors: Any, path: Path, metadata: Any = None) -> None:
            try:
                self.touch("write tensors", path)
            except OSError as error:
                path.write_bytes(b"half")
                raise SafetensorError(f"Error while serializing: I/O error: {error} (os error {self.number})") from None
            plain(tensors, path, metadata)

        return act


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


class File:
    """An open file; its first two writes are moments, and each one once the disk fails."""

    def __init__(self, file: Any, disk: Disk, path: str) -> None:
        self.file, self.disk, self.path, self.writes = file, disk, path, 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes <= 2 or self.disk.failing:  # the first, and one in the midst
            self.disk.touch("write", self.path)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()
