"""The prompt language of A1111's web UI: weights in brackets, adapters in angle brackets.

    (word)        weight 1.1            ((word))  1.21
    [word]        weight 1 / 1.1
    (word:1.3)    weight 1.3, times that of the brackets around it
    \\( \\) \\[ \\] \\\\   the characters themselves
    <lora:name:0.8>     an adapter and its strength

A bracket never closed counts to the end; one never opened is text. Prompt editing (`[a:b:0.5]`, `[a|b]`) is not
part of it.
"""

from __future__ import annotations

import re

from impasto.core.errors import UserError

#: what one bracket multiplies by
ROUND, SQUARE = 1.1, 1 / 1.1

_TOKEN = re.compile(r"\\[()\[\]\\]|[(\[\])]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|[\\:]")
_LORA = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)


def parse(text: str) -> list[tuple[str, float]]:
    """Pieces of `text` with their weights, neighbours of equal weight joined. Empty text is one empty piece."""
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # brackets not closed yet: their kind, and how many pieces came before

    def close(bracket: str, factor: float) -> None:
        _, start = opened.pop()
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for token in _TOKEN.findall(text):
        top = opened[-1][0] if opened else ""
        if token in ("(", "["):
            opened.append((token, len(pieces)))
        elif token == ")" and top == "(":
            close("(", ROUND)
        elif token == "]" and top == "[":
            close("[", SQUARE)
        elif token[0] == ":" and token[-1] == ")" and top == "(":
            close("(", float(token[1:-1]))
        else:
            literal = token[1:] if token[0] == "\\" and len(token) > 1 else token
            pieces.append((literal, 1.0))
    while opened:
        close(opened[-1][0], ROUND if opened[-1][0] == "(" else SQUARE)
    return _joined(pieces)


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def extract_loras(text: str) -> tuple[str, list[tuple[str, float]]]:
    """`text` without its `<lora:name:strength>` tags, and the tags' (name, strength), 1.0 where none is given.

    Of A1111's second strength, for the text encoder alone, nothing is taken: it is an error if it differs.
    Raises `UserError` for a tag that cannot be read.
    """
    found: list[tuple[str, float]] = []

    def take(match: re.Match[str]) -> str:
        name, *strengths = match[1].split(":")
        try:
            values = [float(value) for value in strengths]
        except ValueError:
            values = []
        if not name.strip() or len(values) != len(strengths) or len(set(values)) > 1:
            raise UserError("cannot be read", where=match[0], fix="write <lora:name> or <lora:name:0.8>")
        found.append((name.strip(), values[0] if values else 1.0))
        return ""

    return _LORA.sub(take, text).strip(), found
