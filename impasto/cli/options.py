"""Options that several verbs share, and the small grammars of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for machines.")]
Prediction = Annotated[str | None, typer.Option(
    metavar="epsilon|v_prediction", help="What the base's network predicts, where its file does not tell.")]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there already.")]


def weighted(text: str) -> tuple[str, float]:
    """FILE:0.8 as a file and a weight; without a trailing number the weight is 1, and all of it is the file's name."""
    try:
        return Weighted.parse(text)
    except ValueError:
        return text, 1.0


def picture_size(text: str) -> tuple[int, int]:
    """512x768 as (width, height); one number is a square's side."""
    match = re.fullmatch(r"(\d+)(?:[x×*](\d+))?", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT, such as 512x768")
    return int(match[1]), int(match[2] or match[1])


def own_option(text: str) -> tuple[str, bool | int]:
    """KEY=VALUE, the value a truth or a whole number."""
    key, sign, value = text.partition("=")
    words: dict[str, bool | int] = {"true": True, "false": False}
    if not sign or value.lower() not in words and not value.isdecimal():
        raise typer.BadParameter(f"{text!r} is not KEY=true, KEY=false or KEY=NUMBER", param_hint="--base-option")
    return key.strip(), words.get(value.lower(), int(value) if value.isdecimal() else 0)


def refuse_existing(paths: list[Path], force: bool) -> None:
    """`UserError` if one of the outputs is there already."""
    there = [path for path in paths if path.exists()]
    if there and not force:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise UserError(f"is there already{more}", where=there[0], fix="choose another place, or say --force")
