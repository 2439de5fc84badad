"""The cells of the miniature's tables: a recipe on a lesson at a seed, in a process of its own, and never twice.

What a cell found stays in its folder, for every table that asks for the same cell.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.named import NAMED
from impasto.mini import lessons

#: where cells lie unless told otherwise
FOLDER = Path("runs/cells")
#: lesson -> what its captions call what is taught
NAMES = {"mascot": lessons.MASCOT_NAME, "style": lessons.STYLE_NAME, "familiar": lessons.FAMILIAR_NAME,
         **NAMED}
#: recipe -> the key of the token that it teaches
TOKENS = {"textual_inversion": "method.token", "pivotal": "method.0.token"}


@dataclass(frozen=True)
class Cell:
    """One run: a miniature recipe's name without its `mini/`, and overrides as on the command line."""

    recipe: str
    lesson: str = "mascot"
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def place(self, folder: Path = FOLDER) -> Path:
        """Its own folder: of the pictures and artifacts in run/, and figures.json."""
        from impasto.core.files import key_of

        settings = key_of(list(self.overrides))[:12] if self.overrides else "as-it-is"
        return folder / self.lesson / self.recipe / settings / f"seed-{self.seed}"

    def figures(self, folder: Path = FOLDER) -> dict[str, Any]:
        """What it found: of `impasto.evaluation.demo_result`, and the numbers that it trained and its last losses."""
        return json.loads((self.place(folder) / "figures.json").read_text(encoding="utf-8"))

    def adapter(self, folder: Path = FOLDER) -> Path:
        return Path(self.figures(folder)["adapter"])


def measure(cells: Sequence[Cell], folder: Path = FOLDER, jobs: int = 1) -> list[dict[str, Any]]:
    """The cells' figures: those that lie there, and of the others from `jobs` processes at a time, which share the
    processor's cores."""
    left = [cell for cell in dict.fromkeys(cells) if not (cell.place(folder) / "figures.json").exists()]
    own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}

    def run(cell: Cell) -> None:
        print(cell, file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "benchmarks.cells", str(folder), cell.recipe, cell.lesson,
                        str(cell.seed), *cell.overrides], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | own)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, left))
    return [cell.figures(folder) for cell in cells]


def run(cell: Cell, folder: Path) -> None:
    """Train, draw and read, in this process."""
    from impasto.core.files import write_json
    from impasto.evaluation.demo import losses, run_demo

    place = cell.place(folder)
    token = [f"{TOKENS[cell.recipe]}={NAMES[cell.lesson]}"] if cell.recipe in TOKENS else []
    result = run_demo(cell.lesson, place / "run", cell.seed, recipe_name=f"mini/{cell.recipe}", force=True,
                      overrides=["sample.every=0", "train.device=cpu", *token, *cell.overrides])
    found = losses(place / "run")
    last = found[-max(1, len(found) // 4):]
    write_json(place / "figures.json", {**result.plain(), "trainable": trainable(place / "run" / "recipe.toml"),
                                        "loss": sum(last) / len(last)})
    shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)


def trainable(recipe_file: Path) -> int:
    """Numbers that the recipe trains."""
    from impasto.families.load import load_base
    from impasto.methods import METHODS
    from impasto.training.recipe import load_recipe

    recipe = load_recipe(str(recipe_file))
    base = load_base(recipe.base.path)
    methods = [METHODS.get(options.kind)(options) for options in recipe.method]
    groups = [group for method in methods for group in method.prepare(base, 0)]
    return sum(parameter.numel() for group in groups for parameter in group["params"])


def options(parser: argparse.ArgumentParser) -> None:
    """What every script of cells can be told."""
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all runs; what is done is kept")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, which share the cores")


if __name__ == "__main__":
    run(Cell(sys.argv[2], sys.argv[3], int(sys.argv[4]), tuple(sys.argv[5:])), Path(sys.argv[1]))
