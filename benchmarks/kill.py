"""Whether a run can be lost: it is killed with SIGKILL at random moments, and must end as if it had not been.

    python -m benchmarks.kill [--kills 100] [--again 0.3] [--seed 0]
    python -m benchmarks.kill --processes 2 --kills 10        under torchrun; one of its workers is killed
    python -m benchmarks.kill --random | --base FOLDER        on random weights | on another base

A short DreamBooth run with a LoRA and its average (EMA), validation, previews, artifacts on the way (the best one too)
and checkpoints is done once uninterrupted. Then copies of it are started, each with an empty cache, and killed at a
moment drawn over that whole time, loading and encoding included; the same command follows until it ends, which may be
killed too. In the end artifacts, checkpoints and previews must be equal to the bit, the log must have each step and
each validation once, no step may have been taken again that a valid checkpoint held, and nothing half-written may be
left. Exit code 1 if not.

"steps again" were not in a checkpoint yet; "left in the cache" are half-written entries, which a cache that other
runs may be filling cannot clear.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import print_table
from impasto.training.recipe import read_tree
from tests.training.killing import Job, Sitting, killed, straight
from tests.training.survival import leftovers, lost, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="runs that are killed at least once")
    parser.add_argument("--again", type=float, default=0.3, metavar="P", help="that a further start is killed too")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--base", default="mini", metavar="FOLDER")
    parser.add_argument("--random", action="store_true", help="the base's shape with random weights")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where runs that differ are kept")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="impasto-kill-") as folder:
        if not measure(chosen, chosen.keep or Path(folder)):
            sys.exit(1)


def recipe(chosen: argparse.Namespace) -> dict[str, Any]:
    """The ready recipe, made short, with everything in it that a run can do on the way."""
    tree = read_tree("mini/dreambooth")[1]
    tree["base"] = {"path": chosen.base, "init": "random" if chosen.random else "weights"}
    tree["data"]["resolution"] = 64  # a kill costs as much time as a run
    tree["method"].update(rank=4, dropout=0.1)
    tree["train"].update(steps=chosen.steps, batch_size=2, warmup=2, ema=0.9, device="cpu")
    tree["sample"].update(every=5, steps=3)
    tree["validation"] = {"fraction": 0.3, "every": 2, "repeats": 2}
    tree["output"] = {"name": "killed", "checkpoint_every": 4, "save_every": 3}
    return tree


def measure(chosen: argparse.Namespace, place: Path) -> bool:
    """Kill, go on, compare and print; whether all runs ended as the uninterrupted one."""
    job, chance, started = Job(recipe(chosen), chosen.processes), random.Random(chosen.seed), time.monotonic()
    whole = straight(job, place / "straight")
    print(f"uninterrupted: {whole.reached} steps in {whole.seconds:.1f} s, {chosen.processes} process(es)", flush=True)
    runs: list[list[Sitting]] = []
    bad = parts = missed = 0
    while len(runs) < chosen.kills and missed <= chosen.kills + 10:
        folder = place / f"run-{len(runs) + 1:03d}"
        sittings = killed(job, folder, whole.seconds, chance, chosen.again)
        found = problems(folder, place / "straight", sittings) if sittings[0].killed else []
        if sittings[0].killed:
            runs.append(sittings)
            bad, parts = bad + bool(found), parts + len(leftovers(folder / "cache"))
        else:  # it was faster than the uninterrupted one, and the moment came too late
            missed += 1
        for line in found:
            print(f"{folder.name}, killed in {', '.join(one.phase for one in sittings[:-1])}: {line}", flush=True)
        if not (found and chosen.keep):
            shutil.rmtree(folder)
    report(runs, bad, parts, whole.reached, time.monotonic() - started)
    return not bad and len(runs) == chosen.kills


def report(runs: list[list[Sitting]], bad: int, parts: int, steps: int, seconds: float) -> None:
    deaths = [one for sittings in runs for one in sittings if one.killed]
    phases = Counter(one.phase for one in deaths)
    print()
    print_table(["phase", "kills"], [[name, str(count)] for name, count in phases.most_common()])
    print()
    again = sum(lost(sittings) for sittings in runs)
    header = ["runs", "kills", "most in one run", "as uninterrupted", "steps again", "steps in all",
              "left in the cache"]
    cells = [len(runs), len(deaths), max((len(sittings) - 1 for sittings in runs), default=0), len(runs) - bad, again,
             again + steps * len(runs), parts]
    row = [*map(str, cells), f"{seconds:.0f}"]
    header.append("seconds")
    if any(one.slowest for one in deaths):
        header.append("slowest end, s")
        row.append(f"{max(one.slowest for one in deaths):.1f}")
    print_table(header, [row])


if __name__ == "__main__":
    main()
