"""How long work tells what it is doing, without knowing who listens.

Library functions take a `Reporter`; the default says nothing. The command line passes one that draws
progress bars, the web page one that fills its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """What a phase's block calls: `n` more units are done; `status` is a short text on how it stands."""

    def __call__(self, n: int = 1, status: str = "") -> None: ...


class Reporter:
    """Silent reporter, and the interface of all others."""

    @contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        """A named phase of `total` units; the block gets `advance(n, status)`. Phases may nest."""
        yield _nothing

    def note(self, line: str) -> None:
        """One line that the user may want to know."""

    def warn(self, line: str) -> None:
        """One line that the user should know."""


def _nothing(n: int = 1, status: str = "") -> None:
    """The silent `Advance`."""


SILENT = Reporter()
