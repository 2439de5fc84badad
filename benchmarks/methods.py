"""What each method learns from the same few pictures, what it forgets, and what it costs.

    python -m benchmarks.methods                                           every method, two lessons, three seeds
    python -m benchmarks.methods --methods lora full --lessons mascot --seeds 1
    python -m benchmarks.methods --folder runs/methods                     goes on there where it was stopped

Each cell is a method's miniature recipe (`impasto train mini/lora`) on one lesson (a new object, a new style, a new
name for what the base can draw), run as `impasto demo` runs its own, in a process of its own. *Concept*: pictures in
which a reader sees what was taught, before and after, on backgrounds and in scenes that no training picture has.
*Prompt*: those whose background is the one that was asked for. *Old*: prompts of what the base knew before that are
still drawn right, beside the base's own; *lost*: points that the fine-tune cost. Time is that of the
training alone; memory is the most that the whole process ever held. Means over the seeds, concept with its range.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import MIB, print_table
from impasto.mini import lessons

#: the miniature recipes, in the order of the table
METHODS = ("lora", "loha", "lokr", "dora", "full", "partial", "dreambooth", "textual_inversion", "hypernetwork",
           "pivotal")
#: lesson -> what its captions call what is taught
NAMES = {"mascot": lessons.MASCOT_NAME, "style": lessons.STYLE_NAME, "familiar": lessons.FAMILIAR_NAME}
#: pixels of a picture on the sheet
SIDE = 96
#: method -> the key of the token that it teaches
TOKENS = {"textual_inversion": "method.token", "pivotal": "method.0.token"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)}")
    parser.add_argument("--lessons", nargs="+", choices=NAMES, default=["mascot", "style"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="of all runs; what is done is kept")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every recipe")
    parser.add_argument("--sheet", type=Path, help="a JPEG of each method's first pictures of the first lesson")
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "LESSON", "SEED"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        method, lesson, seed = chosen.child
        return child(method, lesson, int(seed), chosen.folder, chosen.set)
    for lesson in chosen.lessons:
        rows = [row(method, [cell(method, lesson, seed, chosen) for seed in range(chosen.seeds)])
                for method in chosen.methods]
        if chosen.sheet and lesson == chosen.lessons[0]:
            sheet(chosen.sheet, chosen.methods, lesson, chosen.folder)
        print(f"\n{lesson}, {chosen.seeds} seed(s)\n")
        print_table(["method", "trainable", "file, KiB", "peak, MiB", "s, training", "concept before, %", "after, %",
                     "prompt, %", "old before, %", "old after, %", "lost, points"], rows)


def sheet(file: Path, methods: Sequence[str], lesson: str, folder: Path) -> None:
    """A row a method: four pictures of what was taught, and two of what was known before."""
    from impasto.evaluation.lesson import Amounts

    shown, known, label = [0, 1, 2, 3], [Amounts().new, Amounts().new + 1], 150
    made = Image.new("RGB", (label + 6 * SIDE, len(methods) * SIDE), "white")
    font = ImageFont.load_default(15)
    for row_, method in enumerate(methods):
        found = sorted((place(folder, method, lesson, 0) / "run" / "pictures" / "after").glob("*.png"))
        ImageDraw.Draw(made).text((8, row_ * SIDE + SIDE // 2), method, "black", font, anchor="lm")
        for column, number in enumerate([*shown, *known]):
            with Image.open(found[number]) as picture:
                made.paste(picture.resize((SIDE - 4, SIDE - 4)), (label + column * SIDE, row_ * SIDE + 2))
    made.save(file, quality=88)


def cell(method: str, lesson: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """One run's figures: those that lie there, or new ones from a process of its own."""
    told = place(chosen.folder, method, lesson, seed) / "figures.json"
    known = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    if known.get("overrides") != chosen.set:
        print(f"{method} {lesson} {seed}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "benchmarks.methods", "--child", method, lesson, str(seed), "--folder",
                        str(chosen.folder), "--set", *chosen.set], check=True, stdout=subprocess.DEVNULL)
    return json.loads(told.read_text(encoding="utf-8"))


def place(folder: Path, method: str, lesson: str, seed: int) -> Path:
    return folder / lesson / method / f"seed-{seed}"


def child(method: str, lesson: str, seed: int, folder: Path, overrides: list[str]) -> None:
    """Train, draw and read one cell; its figures go into its folder."""
    from impasto.core.files import write_json
    from impasto.evaluation.demo import run_demo

    own = place(folder, method, lesson, seed)
    token = [f"{TOKENS[method]}={NAMES[lesson]}"] if method in TOKENS else []
    result = run_demo(lesson, own / "run", seed, recipe_name=f"mini/{method}", force=True,
                      overrides=["sample.every=0", "train.device=cpu", *token, *overrides])
    write_json(own / "figures.json", {**result.plain(), "overrides": overrides,
                                      "trainable": trainable(own / "run" / "recipe.toml")})
    shutil.rmtree(own / "run" / "checkpoints", ignore_errors=True)


def trainable(recipe_file: Path) -> int:
    """Numbers that the recipe trains."""
    from impasto.families.load import load_base
    from impasto.methods import METHODS as KINDS
    from impasto.training.recipe import load_recipe

    recipe = load_recipe(str(recipe_file))
    base = load_base(recipe.base.path)
    methods = [KINDS.get(options.kind)(options) for options in recipe.method]
    groups = [group for method in methods for group in method.prepare(base, 0)]
    return sum(parameter.numel() for group in groups for parameter in group["params"])


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
