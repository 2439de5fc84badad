"""How good forecasts were: what each run was told to take beside what it took, kept on this machine and nowhere else.

One line of JSON for each run, appended: runs at the same time do not disturb each other, and a line that a kill has cut
short is passed over.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from impasto.core.files import cache_dir


@dataclass(frozen=True)
class Drift:
    """Relative differences, (measured - forecast) / forecast: above zero a run took more than it was told to."""

    count: int
    median: float
    #: the one that is farthest from zero, and the run that it is of
    worst: float
    run: str

    def summary(self) -> str:
        """12 runs took +0.4% of what was forecast in the median, +3.1% at worst (dog)."""
        runs = f"{self.count} run{'s' if self.count > 1 else ''}"
        return f"{runs}: memory {self.median:+.1%} beside the forecast in the median, {self.worst:+.1%} at worst " \
               f"({self.run})"


def record(run: str, forecast: int, measured: int, about: Mapping[str, str] | None = None) -> None:
    """Keep the peaks of a run, in bytes, with what may tell runs apart (device, precision, methods).

    A place that cannot be written costs the record, and no run.
    """
    line = json.dumps({"run": run, "forecast": forecast, "measured": measured, **(about or {})}) + "\n"
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_file(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())  # at once: an appending write is not torn by another's
        finally:
            os.close(descriptor)
    except OSError:
        pass


def seen() -> Drift | None:
    """All runs so far; None before the first."""
    found = [(entry["measured"] / entry["forecast"] - 1, str(entry["run"])) for entry in _entries()]
    if not found:
        return None
    worst, run = max(found, key=lambda one: abs(one[0]))
    return Drift(len(found), statistics.median(off for off, _ in found), worst, run)


def _file() -> Path:
    return cache_dir() / "forecasts.jsonl"


def _entries() -> list[dict]:
    """The lines that can be read and compared."""
    try:
        lines = _file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["forecast"] > 0 and entry["measured"] > 0 and "run" in entry:
                found.append(entry)
        except (ValueError, KeyError, TypeError):
            continue
    return found
