"""What a repository on the Hugging Face hub may be called."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)


def repository(name: str) -> str:
    """`owner/name` as it is. Raises `ValueError` if the hub would refuse it."""
    owner, slash, own = name.partition("/")
    if not slash or "/" in own:
        raise ValueError("is not OWNER/NAME, a repository on the hub")
    if not (_NAME.fullmatch(owner) and _NAME.fullmatch(own)) or "--" in name or ".." in name or len(name) > 96 or \
            own.endswith(".git"):
        raise ValueError("is no name for a repository: up to 96 letters, digits, '-', '_' and '.', without '--' or "
                         "'..', and neither '-' nor '.' at an end")
    return name
