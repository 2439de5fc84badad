"""What becomes of a class when one of its kind is taught: "a heart", after a purple striped one was."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cells import Cell
from impasto.core.files import write_json
from impasto.evaluation.lesson import Amounts
from impasto.evaluation.quality import Asked, drawn, settings
from impasto.evaluation.reader import load_reader
from impasto.families.load import load_base
from impasto.mini import lessons, world

#: pictures of each prompt for the class, with different seeds
EACH = 6
SIDE = 128


def of_the_class(cell: Cell, folder: Path) -> dict[str, float]:
    """How often any heart is drawn as the one that was taught, and how diverse hearts are.

    *drift*: the share of pictures of "a heart" that are purple and striped. *diversity*: the mean distance between
    the reader's features of pictures of one prompt, in units of the untouched base's (as DreamBooth's DIV, which takes
    LPIPS: Ruiz et al. 2022, section 4.1).
    """
    place = cell.place(folder) / "class.json"
    if not place.exists():
        reader, base, made = load_reader(), load_base("mini"), cell.adapter(folder)
        taught, adapters = (load_base(made), ()) if made.is_dir() else (base, ((made, 1.0),))
        how = settings(SIDE, Amounts().steps)
        own, plain = [*drawn(taught, _hearts(), how, adapters=adapters)], [*drawn(base, _hearts(), how)]
        thing = lessons.FAMILIAR
        wanted = {"shape": thing.shape, "colour": thing.colour, "texture": thing.texture}.items()
        taken = [wanted <= answers.items() for answers in reader.read(own)]
        write_json(place, {"drift": statistics.fmean(taken),
                           "diversity": _spread(reader.features(own)) / _spread(reader.features(plain))})
    return json.loads(place.read_text(encoding="utf-8"))


def _hearts(grounds: Sequence[str] = lessons.FAMILIAR_ASKED_ON) -> list[Asked]:
    """Prompts for any heart, one background after the other."""
    return [Asked(f"a {lessons.FAMILIAR.shape} on {world.an(f'{ground} background')}", 9000 + seed, {})
            for ground in grounds for seed in range(EACH)]


def _spread(features: torch.Tensor) -> float:
    """The mean distance within the groups of one prompt, of features (N, F)."""
    return statistics.fmean(torch.pdist(group.flatten(1).double()).mean().item() for group in features.split(EACH))
