"""Tables of another trainer's keys: a row is what becomes of one; and how values are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What becomes of one key. With `to`, its value, turned, is that recipe key's, and `why` remarks on it.

    Without, nothing becomes of it, for the reason `why`; `here` is the recipe key whose value stands in its place.
    `needless` keys lose nothing. A value in `neutral`, and one that is nothing at all, has no effect.
    """

    to: str = ""
    turn: Callable[[Any], Any] = str
    why: str = ""
    here: str = ""
    needless: bool = False
    neutral: tuple[Any, ...] = ()


def rows(why: str, keys: str, *, here: str = "", needless: bool = False) -> dict[str, Row]:
    """Rows of keys that share a reason. "size=100" says that 100 is the value without effect."""
    pairs = (item.partition("=") for item in keys.split())
    return {key: Row(why=why, here=here, needless=needless, neutral=(value,) if sign else ())
            for key, sign, value in pairs}


# --- values ------------------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A text that a file can hold."""
    if not isinstance(value, str | int | float):
        raise ValueError("is no text")
    str(value).encode()  # a lone surrogate is a ValueError
    return str(value)


def number(value: Any) -> float:
    """A finite number, also out of a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("is no number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError("is no number") from None
    if not math.isfinite(found):
        raise ValueError("is no number")
    return found


def whole(value: Any) -> int:
    """A whole number, also out of a text."""
    if number(value) != int(float(value)):
        raise ValueError("is no whole number")
    return int(float(value))


def flag(value: Any) -> bool:
    """True or false, also out of a text."""
    if str(value).lower() not in ("true", "false", "1", "0"):
        raise ValueError("is neither true nor false")
    return str(value).lower() in ("true", "1")


def several(value: Any) -> list[float]:
    """Numbers, out of a list or a text such as "0.9, 0.999"."""
    items = value if isinstance(value, list) else str(value).strip("()[] ").replace(",", " ").split()
    return [number(item) for item in items]


def named(words: Mapping[str, Any], lacks: str = "Impasto has nothing like it") -> Callable[[Any], Any]:
    """The value of one of their words; another word is not carried, since `lacks`."""
    def turn(value: Any) -> Any:
        if str(value).lower() not in words:
            raise ValueError(lacks)
        return words[str(value).lower()]

    return turn


def nothing(value: Any, neutral: Iterable[Any] = ()) -> bool:
    """Whether a value says nothing: absent, empty, or one of `neutral`, as a text or as a number."""
    if value is None or value == "" or value == [] or value == {}:
        return True
    return any(value == other or _plain(value) == _plain(other) for other in neutral)


def _plain(value: Any) -> Any:
    try:
        return number(value)
    except ValueError:
        return str(value).lower()
