"""What each method learns from the same few pictures, what it forgets, and what it costs.

    python -m benchmarks.methods                                           every method, two lessons, three seeds
    python -m benchmarks.methods --methods lora full --lessons mascot --seeds 1
    python -m benchmarks.methods --jobs 2                                  two runs at a time

Each cell is a method's miniature recipe (`impasto train mini/lora`) on one lesson (a new object, a new style, a new
name for what the base can draw), run as `impasto demo` runs its own, in a process of its own. *Concept*: pictures in
which a reader sees what was taught, before and after, on backgrounds and in scenes that no training picture has.
*Prompt*: those whose background is the one that was asked for. *Old*: prompts of what the base knew before that are
still drawn right, beside the base's own; *lost*: points that the fine-tune cost. Time is that of the
training alone; memory is the most that the whole process ever held. Means over the seeds, concept with its range.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.cells import NAMES, Cell, measure, options
from benchmarks.common import MIB, print_table
from benchmarks.sheets import contact
from impasto.evaluation.lesson import Amounts

#: the miniature recipes, in the order of the table
METHODS = ("lora", "loha", "lokr", "dora", "full", "partial", "dreambooth", "textual_inversion", "hypernetwork",
           "pivotal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)}")
    parser.add_argument("--lessons", nargs="+", choices=NAMES, default=["mascot", "style"])
    parser.add_argument("--seeds", type=int, default=3)
    options(parser)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every recipe")
    parser.add_argument("--sheet", type=Path, help="a JPEG of each method's first pictures of the first lesson")
    chosen = parser.parse_args()
    for lesson in chosen.lessons:
        cells = {method: [Cell(method, lesson, seed, tuple(chosen.set)) for seed in range(chosen.seeds)]
                 for method in chosen.methods}
        measure([cell for row in cells.values() for cell in row], chosen.folder, chosen.jobs)
        rows = [row(method, [cell.figures(chosen.folder) for cell in own]) for method, own in cells.items()]
        if chosen.sheet and lesson == chosen.lessons[0]:
            contact(chosen.sheet, {method: pictures(own[0].place(chosen.folder) / "run")
                                   for method, own in cells.items()})
        print(f"\n{lesson}, {chosen.seeds} seed(s)\n")
        print_table(["method", "trainable", "file, KiB", "peak, MiB", "s, training", "concept before, %", "after, %",
                     "prompt, %", "old before, %", "old after, %", "lost, points"], rows)


def pictures(folder: Path) -> list[Image.Image]:
    """Of a run's pictures after the training, four of what was taught and two of what was known before."""
    found = sorted((folder / "pictures" / "after").glob("*.png"))
    return [Image.open(found[number]) for number in (0, 1, 2, 3, Amounts().new, Amounts().new + 1)]


def row(method: str, cells: list[dict[str, Any]]) -> list[str]:
    def mean(key: str, scale: float = 1.0) -> float:
        return scale * statistics.fmean(each[key] for each in cells)

    concept = [100 * each["recognised_after"] for each in cells]
    spread = f" ({min(concept):.0f}-{max(concept):.0f})" if len(cells) > 1 else ""
    seconds = statistics.fmean(each["seconds_by_phase"]["training"] for each in cells)
    return [method, f"{cells[0]['trainable']:,}", f"{mean('size') / 1024:,.0f}", f"{mean('memory') / MIB:,.0f}",
            f"{seconds:.0f}", f"{mean('recognised_before', 100):.0f}", f"{statistics.fmean(concept):.0f}{spread}",
            f"{mean('backgrounds', 100):.0f}",
            f"{mean('old_before', 100):.0f}", f"{mean('old_after', 100):.0f}", f"{mean('lost', 100):.1f}"]


if __name__ == "__main__":
    main()
