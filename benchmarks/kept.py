"""What keeps a base's knowledge while it is taught: nothing, class pictures, or the frozen base's own predictions.

    python -m benchmarks.kept [--seeds 3] [--jobs 2] [--only lora]

A purple striped heart is taught as "sks heart" (DreamBooth). *concept*: pictures in which it is seen; *old*: prompts of
all sorts that are still drawn right, beside the base's own; *taken for it*: pictures of "a heart" that have become the
one that was taught; *diversity*: of such pictures, in units of the base's. Class pictures are either drawn by the base,
of "a heart", or given, of all sorts; what the base alone says (`[objective] kind = "teach"`) is asked of it about "a
heart", or about all sorts. A full fine-tune has no frozen base beside it to be asked.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.cells import Cell, measure, options
from benchmarks.common import print_table
from benchmarks.drift import of_the_class
from impasto.mini import lessons

LESSON = "heart-by-its-class"
CLASS = f"a {lessons.FAMILIAR.shape}"


def sorts() -> list[str]:
    """Captions of all sorts, one of which is asked about in each step."""
    return [caption for caption, _ in lessons.prior_pictures(8)]


def teach(captions: list[str]) -> list[str]:
    return ["prior.weight=0", "objective.kind=teach", f"objective.caption={json.dumps(captions)}"]


GIVEN = ["prior.folder=mini:prior", "prior.weight=0.3"]
DRAWN = ["prior.folder=", f"prior.caption={CLASS}", "prior.images=64", "prior.steps=12", "prior.guidance=4",
         "prior.batch_size=16", "prior.weight=0.3"]
#: recipe -> how knowledge is kept -> overrides
ROWS: dict[str, dict[str, list[str]]] = {
    "dreambooth": {"nothing": ["prior.weight=0"], "class pictures, given, of all sorts": [],
                   "class pictures, drawn, of a heart": DRAWN, "teach, about a heart": teach([CLASS]),
                   "teach, about all sorts": teach(sorts())},
    "loha": {"nothing": ["train.weight_decay=0"],
             "class pictures, given, of all sorts": ["train.weight_decay=0", *GIVEN]},
    "full": {"nothing": ["prior.weight=0"], "class pictures, given, of all sorts": []},
}
NAMES = {"dreambooth": "LoRA", "loha": "LoHa", "full": "full"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="RECIPE", help=", ".join(ROWS))
    options(parser)
    told = parser.parse_args()
    cells = {(recipe, how): [Cell(recipe, LESSON, seed, tuple(overrides)) for seed in range(told.seeds)]
             for recipe in told.only for how, overrides in ROWS[recipe].items()}
    measure([cell for own in cells.values() for cell in own], told.folder, told.jobs)
    rows = [row(recipe, how, [cell.figures(told.folder) | of_the_class(cell, told.folder) for cell in own])
            for (recipe, how), own in cells.items()]
    print(f"\n{told.seeds} seed(s)\n")
    print_table(["method", "what keeps", "s, training", "concept, %", "old before, %", "old after, %",
                 "taken for it, %", "diversity"], rows)


def row(recipe: str, how: str, cells: list[dict[str, Any]]) -> list[str]:
    def mean(key: str) -> float:
        return statistics.fmean(each[key] for each in cells)

    seconds = statistics.fmean(each["seconds_by_phase"]["training"] for each in cells)
    shares = (f"{100 * mean(key):.0f}" for key in ("recognised_after", "old_before", "old_after", "drift"))
    return [NAMES[recipe], how, f"{seconds:.0f}", *shares, f"{mean('diversity'):.2f}"]


if __name__ == "__main__":
    main()
