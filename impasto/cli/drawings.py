"""Small pictures in text: bars, and what a file says of itself made safe for a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence

from impasto.cli.console import can_show

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(part: float, width: int, *, ascii_only: bool) -> str:
    """A horizontal bar, `part` of `width` cells long, to an eighth of a cell where the code page has such blocks."""
    part = min(max(part, 0.0), 1.0)
    if ascii_only:
        return "#" * round(part * width)
    whole, rest = divmod(round(part * width * 8), 8)
    return ("█" * whole + _EIGHTHS[rest]).rstrip()


def bars(values: Mapping[str, float]) -> list[str]:
    """A line for each value: its name, a bar as long as the value beside the largest, the value."""
    if not values:
        return []
    names = max(map(len, values))
    width = max(8, min(40, columns() - names - 16))
    top = max(values.values()) or 1.0
    ascii_only = not can_show(_EIGHTHS, sys.stdout)
    return [f"{name:<{names}}  {bar(value / top, width, ascii_only=ascii_only):<{width}}  {value:.3g}"
            for name, value in values.items()]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows]


def safe(text: str) -> str:
    """A file's own words on one line, without the control codes that could command a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def short(text: str, width: int) -> str:
    """`safe(text)`, cut to `width`."""
    line = safe(text)
    return line if len(line) <= width else line[: max(width - 3, 1)] + "..."


def columns() -> int:
    """The terminal's width; 80 in a pipe."""
    return shutil.get_terminal_size((80, 24)).columns
