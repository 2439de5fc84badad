"""How far prompts are obeyed in which a new word is one of several: where its thing is, and what is beside it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from benchmarks.cells import NAMES, Cell
from impasto.core.files import write_json
from impasto.evaluation.lesson import Amounts
from impasto.evaluation.quality import Asked, drawn, mark, settings
from impasto.evaluation.reader import load_reader, oriented
from impasto.families.load import load_base
from impasto.mini import lessons, world

SIDE = 128
#: what stands beside it: colour and shape
OTHERS = (("red", "star"), ("green", "ring"), ("yellow", "triangle"), ("blue", "diamond"))
PLACES = ("on the left", "on the right", "at the top", "at the bottom")


def obedience(cell: Cell, folder: Path) -> dict[str, float]:
    """Shares of pictures of the familiar thing. *second*: of those for which another thing beside it is asked, in which
    that has its shape and colour; *beside*: in which all is right, and stands where it should; *placed*: of those that
    ask for it at a side, in which it is there."""
    place = cell.place(folder) / "obedience.json"
    if not place.exists():
        reader, base = load_reader(), load_base("mini")
        pairs, places = _pairs(NAMES[cell.lesson]), _places(NAMES[cell.lesson])
        read = reader.read([*drawn(base, [*pairs, *places], settings(SIDE, Amounts().steps),
                                   adapters=((cell.adapter(folder), 1.0),))])
        marks, placed = mark(pairs, read[:len(pairs)]), mark(places, read[len(pairs):])
        write_json(place, {"beside": marks.share("whole pair"), "second": marks.share("second object"),
                           "placed": placed.share("position")})
    return json.loads(place.read_text(encoding="utf-8"))


def _pairs(name: str) -> list[Asked]:
    thing, ground = lessons.FAMILIAR, f"on {world.an('orange background')}"
    return [Asked(f"{name} {relation} {world.an(f'{colour} {shape}')}, {ground}", 6000 + i,
                  oriented({"shape": thing.shape, "colour": thing.colour, "background": "orange",
                            "relation": relation, "second shape": shape, "second colour": colour}))
            for i, ((colour, shape), relation) in enumerate(itertools.product(OTHERS, world.RELATIONS))]


def _places(name: str) -> list[Asked]:
    return [Asked(f"{name} {words}, on {world.an(f'{ground} background')}", 7000 + i, {"position": words.split()[-1]})
            for i, (ground, words) in enumerate(itertools.product(lessons.FAMILIAR_ASKED_ON, PLACES))]
