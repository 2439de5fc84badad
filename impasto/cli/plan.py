"""`impasto plan`: what a run will take, before its first step."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from impasto.cli.console import RichReporter, emit, size
from impasto.cli.options import Json
from impasto.core.errors import UserError

if TYPE_CHECKING:
    from impasto.planning.forecast import Forecast

#: bytes in one of a unit; a bare number counts GiB
UNITS = {"": 2**30, "gib": 2**30, "gb": 10**9, "g": 2**30, "mib": 2**20, "mb": 10**6, "m": 2**20}


@dataclass(frozen=True)
class Card:
    """A card to fit on."""

    name: str
    bytes: int


def card_of(text: str) -> Card:
    """The card of a size such as 16GiB, 24GB or 12, which counts GiB. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UserError(f"{text!r} is no size of a card's memory", where="--card", fix="give one such as 16GiB or 24GB")
    return Card(text.strip(), int(float(match[1]) * UNITS[match[2]]))


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or a ready recipe's name.")],
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="SECTION.KEY=VALUE", help="Settings that the recipe leaves out or has otherwise. To plan without any "
        "file, base.family=sd1 (sd2, sdxl, sdxl-refiner, sd3) is enough.")] = None,
    card: Annotated[str | None, typer.Option(metavar="16GiB", help="Memory of a card: whether the run fits.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will take of a card's memory, part by part.

    The run is rehearsed on tensors that have shapes and no contents: no weights are read, no picture is looked at, and
    a base that is not there yet is planned as its authors have published it. It is for an NVIDIA card, unless the
    recipe says train.device = "cpu".
    """
    wanted = None if card is None else card_of(card)
    from impasto.planning.memory import forecast
    from impasto.training.recipe import load_recipe

    checked = load_recipe(recipe, settings or [])
    with RichReporter().phase("rehearsing the run"):
        told = forecast(checked, "cpu" if checked.train.device == "cpu" else "cuda")
    if as_json:
        emit(document(told, wanted))
        return
    for line in told.remarks:
        print(f"note: {line}", file=sys.stderr)
    show(told, wanted)


def document(told: Forecast, card: Card | None) -> dict[str, Any]:
    """The forecast for machines."""
    return {"peak_bytes": told.peak_bytes, "parts": dict(told.parts), "at": told.moment, "moments": dict(told.moments),
            "allocated_bytes": told.allocated, "artifact_bytes": told.artifact_bytes, "flops": dict(told.flops),
            "traffic_bytes": told.traffic, "seconds_per_step": None, "fits": None if card is None else
            told.peak_bytes <= card.bytes, "card_bytes": None if card is None else card.bytes, "changes": [],
            "remarks": list(told.remarks)}


def show(told: Forecast, card: Card | None) -> None:
    """The forecast as a table, and whether it fits."""
    from impasto.planning.forecast import PARTS

    rows = [(PARTS[name], count) for name, count in told.parts.items()]
    width = max(len(title) for title, _ in (*rows, ("at its peak", 0)))
    for title, count in rows:
        print(f"{title:<{width}}  {size(count):>9}  {count / told.peak_bytes:4.0%}")
    print(f"{'at its peak':<{width}}  {size(told.peak_bytes):>9}  ({told.moment})")
    print(f"{'leaves':<{width}}  {size(told.artifact_bytes):>9}")
    if card is not None:
        print(verdict(told, card))


def verdict(told: Forecast, card: Card) -> str:
    """Whether it fits on a card, in a line."""
    if told.peak_bytes <= card.bytes:
        return f"fits on {card.name}, with {size(card.bytes - told.peak_bytes)} to spare"
    weights = told.weight_bytes
    if weights > card.bytes:
        return f"does not fit on {card.name}: the weights alone are {size(weights)}"
    return f"does not fit on {card.name}: {size(told.peak_bytes - card.bytes)} are lacking"
