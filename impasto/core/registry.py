"""Registries: a name and a dotted path a line, resolved at use, so that listing costs no import."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from impasto.core.errors import UserError, nearest


class Registry:
    """Names mapped to `"package.module:attribute"`. A new thing is one file and one line here."""

    def __init__(self, noun: str, entries: dict[str, str]) -> None:
        self.noun = noun
        self.entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def get(self, name: str) -> Any:
        """The thing itself, imported now. An unknown name is a `UserError` with the nearest known one."""
        if name not in self.entries:
            raise UserError(f"unknown {self.noun} {name!r}", fix=nearest(name, self.entries))
        module, attribute = self.entries[name].split(":")
        return getattr(importlib.import_module(module), attribute)
