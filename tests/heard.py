"""A reporter that keeps what it is told."""

from __future__ import annotations

from impasto.core.progress import Reporter


class Heard(Reporter):
    """Its warnings and its notes, in their order."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def note(self, line: str) -> None:
        self.notes.append(line)
