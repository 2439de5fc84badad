"""What verbs say: results on stdout, everything else on stderr; progress as bars or, in a pipe, as lines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from impasto.core.errors import UserError
from impasto.core.progress import Advance, Reporter


def complain(error: UserError, *, as_json: bool = False) -> None:
    """The one line of a failure on stderr; with `as_json`, the same as an object on stdout."""
    if as_json:
        emit({"error": {"what": error.what, "where": error.where, "fix": error.fix}})
    print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)


def emit(value: object) -> None:
    """A result for machines: one JSON document on stdout, in ASCII, whatever the code page."""
    print(json.dumps(value, indent=1))


def can_show(text: str, stream: TextIO) -> bool:
    """Whether the stream's encoding has all the characters of `text`."""
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def duration(seconds: float) -> str:
    """1:05, 2:01:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes as people read them: 512 B, 1.5 KiB, 3.97 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


class Pace:
    """How far a phase is, how quickly it goes and how long it will take; its text is true when it is read.

    The rate is that of all units after the first report: what is done at once (a resumed run), and a slow first
    step, tell nothing of the rest.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.done, self.status = total, unit, 0, ""
        self.started = time.monotonic()
        self.first: tuple[float, int] | None = None

    def advance(self, n: int, status: str) -> None:
        self.done += n
        self.status = status or self.status
        self.first = self.first or (time.monotonic(), self.done)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units a second; 0 while it cannot be told."""
        if self.first is None or self.done == self.first[1]:
            return 0.0
        return (self.done - self.first[1]) / max(time.monotonic() - self.first[0], 1e-9)

    def __str__(self) -> str:
        parts = []
        if self.total is not None:
            parts.append(f"{self.done}/{self.total} {self.unit}".strip())
        elif self.done:
            parts.append(f"{self.done} {self.unit}".strip())
        if rate := self.rate:
            parts.append(f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each")
            if self.total is not None:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        elif self.elapsed >= 1:
            parts.append(duration(self.elapsed))
        return ", ".join([*parts, self.status] if self.status else parts)

    def summary(self) -> str:
        """What remains to be said when it is over."""
        count = f"{self.done} {self.unit}".strip() + " in " if self.done else ""
        return count + duration(self.elapsed)


class RichReporter(Reporter):
    """Bars while stderr is a terminal; elsewhere a line when a phase begins, now and then, and when it ends."""

    #: seconds to the first line of a phase in a pipe; later ones come more and more rarely
    EVERY = 10.0

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bars: Any = None  # rich's Progress while a phase is open on a terminal

    def note(self, line: str) -> None:
        self._say(line)

    def warn(self, line: str) -> None:
        self._say(f"warning: {line}")

    def _say(self, line: str) -> None:
        if self._bars is not None:  # above the bars, not through them
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        pace = Pace(total, unit)
        with (self._bar if self.live else self._lines)(title, pace) as advance:
            yield advance
        if pace.elapsed >= 1:
            self._say(f"{title}: {pace.summary()}")

    @contextmanager
    def _lines(self, title: str, pace: Pace) -> Iterator[Advance]:
        self._say(f"{title} ...")
        due = self.EVERY

        def advance(n: int = 1, status: str = "") -> None:
            nonlocal due
            pace.advance(n, status)
            if pace.elapsed >= due:
                self._say(f"{title}: {pace}")
                due = pace.elapsed * 1.05 + self.EVERY

        yield advance

    @contextmanager
    def _bar(self, title: str, pace: Pace) -> Iterator[Advance]:
        outermost = self._bars is None
        if outermost:
            self._bars = _make_bars(self.stream)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(title, total=pace.total, pace=pace)

        def advance(n: int = 1, status: str = "") -> None:
            pace.advance(n, status)
            bars.update(task, completed=pace.done)

        try:
            yield advance
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None


def _make_bars(stream: TextIO) -> Any:
    """rich's live display: a spinner, the title, a bar and the pace, on one line whatever the width."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.table import Column

    def one_line(ratio: int) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", ratio=ratio)

    return Progress(
        SpinnerColumn("line"),  # ASCII, for any code page
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[pace]}", markup=False, table_column=one_line(1)),
        console=Console(file=stream), transient=True, expand=True, refresh_per_second=4,
        redirect_stdout=stream is sys.stderr and sys.stdout.isatty(), redirect_stderr=stream is sys.stderr)
