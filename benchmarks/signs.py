"""Six things that are said of fine-tuning, looked for on the embedded base over paired seeds.

    python -m benchmarks.signs [--seeds 5] [--jobs 2] [--only 2 6]

Of each pair that is said to differ, the seeds at which it differs as it is said to, not at all, and the other way; and
both means. Both runs of a pair have the same seed: the same noise, order and prompts.
  1  textual inversion fails on what the base cannot draw, where LoRA learns it
  2  with class pictures less drifts and what is drawn of the class is more diverse; fidelity falls a little
  3  the right word for the class beats a wrong one, and that none
  4  textual inversion at a higher rate: more fidelity, less obedience to the rest of the prompt
  5  files' sizes are in their order; a LoHa's rank is up to r², a LoRA's up to r (the same at any seed: one is made)
  6  more rank with alpha = 1, and with alpha = rank / 2, part ways
That textual inversion leaves every other tensor as it was, to the bit, is a test (tests/methods).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Cell, measure, options
from benchmarks.common import print_table
from benchmarks.drift import of_the_class
from benchmarks.obedience import obedience
from impasto.formats.adapters import load_adapter

#: figures in words, and by how much they are multiplied
FIGURES = {"recognised_after": ("concept, %", 100), "backgrounds": ("prompt, %", 100), "old_after": ("old, %", 100),
           "second": ("what is beside it, %", 100),
           "loss": ("loss", 1), "drift": ("class taken for it, %", 100), "diversity": ("diversity", 1),
           "size": ("file, KiB", 1 / 1024)}
#: steps at which a heart's name still matters: later it is learned by any
EARLY = 40
RATES = ("1e-3", "1e-2", "0.2")
RANKS = (2, 8, 32)


@dataclass(frozen=True)
class Side:
    """A set-up, as the same cell at each of several seeds."""

    name: str
    recipe: str
    lesson: str = "mascot"
    overrides: tuple[str, ...] = ()
    look: Callable[[Cell, Path], dict[str, Any]] | None = None  # more figures than the cell's own

    def cells(self, seeds: int) -> list[Cell]:
        return [Cell(self.recipe, self.lesson, seed, self.overrides) for seed in range(seeds)]

    def found(self, figure: str, seeds: int, folder: Path) -> list[float]:
        cells = self.cells(seeds)
        own = [cell.figures(folder) | (self.look(cell, folder) if self.look else {}) for cell in cells]
        return [each[figure] for each in own]


@dataclass(frozen=True)
class Pair:
    """What is said: that `figure` of `one` is more than that of `other`."""

    sign: int
    figure: str
    one: Side
    other: Side


# --- the pairs -------------------------------------------------------------------------------------------
def pairs() -> Iterator[Pair]:
    yield Pair(1, "recognised_after", Side("LoRA", "lora"), Side("textual inversion", "textual_inversion"))

    heart = "heart-by-its-class"
    kept = Side("class pictures", "dreambooth", heart, look=of_the_class)
    alone = Side("none", "dreambooth", heart, ("prior.weight=0",), look=of_the_class)
    yield Pair(2, "drift", alone, kept)
    yield Pair(2, "old_after", kept, alone)
    yield Pair(2, "diversity", kept, alone)
    yield Pair(2, "recognised_after", alone, kept)

    right, wrong, none = (Side(name, "dreambooth", lesson, (f"train.steps={EARLY}",)) for name, lesson in (
        ("right class", heart), ("wrong class", "heart-by-a-wrong-class"), ("no class", "heart-by-no-class")))
    yield Pair(3, "recognised_after", right, wrong)
    yield Pair(3, "recognised_after", wrong, none)
    yield Pair(3, "recognised_after", right, none)

    by_rate = [Side(f"rate {rate}", "textual_inversion", "familiar",
                    (f"train.learning_rate={rate}", "method.norm_penalty=0"), obedience) for rate in RATES]
    for slower, faster in itertools.pairwise(by_rate):
        yield Pair(4, "recognised_after", faster, slower)
        yield Pair(4, "second", slower, faster)

    sizes = [Side(name, name) for name in ("textual_inversion", "lokr", "lora", "partial", "full")]
    for smaller, larger in itertools.pairwise(sizes):
        yield Pair(5, "size", larger, smaller)

    def ranked(rank: int, alpha: float) -> Side:
        return Side(f"rank {rank}, alpha {alpha:g}", "dreambooth", "mascot",
                    (f"method.rank={rank}", f"method.alpha={alpha:g}", "train.steps=80"))

    for less, more in itertools.pairwise(RANKS):
        for figure in ("loss", "recognised_after"):
            sides = (ranked(less, 1), ranked(more, 1))  # learns less
            yield Pair(6, figure, *(sides if figure != "loss" else sides[::-1]))
            sides = (ranked(more, more / 2), ranked(less, less / 2))  # learns more
            yield Pair(6, figure, *(sides if figure != "loss" else sides[::-1]))


# --- the ranks of what was learned -----------------------------------------------------------------------
def ranks(folder: Path) -> list[list[str]]:
    """Rows: a method, its r, the bound on its change's rank, the highest found in float64, and how many layers have all
    that they can have."""
    rows = []
    for name, r, bound in (("lora", 16, 16), ("loha", 8, 64)):
        found, short = [], []
        for (delta,) in load_adapter(Cell(name).adapter(folder)).deltas.values():
            change = delta.double().weight().detach().flatten(1)
            found.append(int(torch.linalg.matrix_rank(change)))
            short.append(min(bound, *change.shape))
        full = sum(rank == most for rank, most in zip(found, short, strict=True))
        rows.append([name, str(r), str(bound), str(max(found)), f"{full} of {len(found)}"])
    return rows


# --- the table -------------------------------------------------------------------------------------------
def row(pair: Pair, seeds: int, folder: Path) -> list[str]:
    one, other = (side.found(pair.figure, seeds, folder) for side in (pair.one, pair.other))
    name, scale = FIGURES[pair.figure]
    signs = [(a > b) - (a < b) for a, b in zip(one, other, strict=True)]
    digits = 4 if pair.figure == "loss" else 2 if pair.figure == "diversity" else 0
    return [str(pair.sign), f"{name}: {pair.one.name} > {pair.other.name}",
            *(f"{scale * statistics.fmean(values):.{digits}f}" for values in (one, other)),
            str(signs.count(1)), str(signs.count(0)), str(signs.count(-1))]


def needed(chosen: Mapping[int, list[Pair]], seeds: int) -> list[Cell]:
    made = [cell for own in chosen.values() for pair in own for side in (pair.one, pair.other)
            for cell in side.cells(many(pair, seeds))]
    return made + (Side("loha", "loha").cells(1) if 5 in chosen else [])


def many(pair: Pair, seeds: int) -> int:
    """Seeds at which it is looked for."""
    return 1 if pair.figure == "size" else seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], metavar="N", help="of the signs")
    options(parser)
    told = parser.parse_args()
    chosen: dict[int, list[Pair]] = {}
    for pair in pairs():
        if pair.sign in told.only:
            chosen.setdefault(pair.sign, []).append(pair)
    measure(needed(chosen, told.seeds), told.folder, told.jobs)
    rows = [row(pair, many(pair, told.seeds), told.folder) for own in chosen.values() for pair in own]
    print(f"\n{told.seeds} paired seeds\n")
    print_table(["sign", "it is said that", "the one", "the other", "so", "equal", "not so"], rows)
    if 5 in chosen:
        print()
        print_table(["method", "r", "at most", "highest rank found", "layers of the highest that they can have"],
                    ranks(told.folder))


if __name__ == "__main__":
    main()
