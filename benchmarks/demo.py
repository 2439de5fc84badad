"""What `impasto demo` shows and costs, over several seeds.

    python -m benchmarks.demo [--seeds 3] [--style]

Each seed is the real command in a process of its own, in a fresh folder. "s, demo" is what it says of itself, "s, wall"
counts from typing the command to its end, imports included. Pictures that the lesson learns from lie in the user's
cache from the first run on, which IMPASTO_CACHE can move.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import MIB, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="of the seeds")
    parser.add_argument("--style", action="store_true", help="the style instead of the mascot")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the demos' folders here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = chosen.keep or Path(folder)
        results = [measure(place / f"seed-{seed}", seed, chosen.style)
                   for seed in range(chosen.first, chosen.first + chosen.seeds)]
    rows = [row(str(result["seed"]), result) for result in results]
    if len(results) > 1:
        numbers = [key for key, value in results[0].items() if isinstance(value, int | float)]
        rows.append(row("mean", {key: statistics.fmean(result[key] for result in results) for key in numbers}))
    print_table(["seed", "recognised before", "after", "backgrounds", "old prompts before", "after", "points lost",
                 "s, demo", "s, wall", "peak MiB", "file MiB"], rows)


def measure(folder: Path, seed: int, style: bool) -> dict[str, Any]:
    """One demo in a process of its own: what it prints, and the seconds on the wall."""
    command = [sys.executable, "-m", "impasto", "demo", "--json", "--seed", str(seed), "-o", str(folder)]
    started = time.monotonic()
    done = subprocess.run([*command, *(["--style"] if style else [])], stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout), "wall": time.monotonic() - started}


def row(name: str, result: dict[str, Any]) -> list[str]:
    shares = [f"{100 * result[key]:.1f}" for key in ("recognised_before", "recognised_after", "backgrounds",
                                                     "old_before", "old_after", "lost")]
    return [name, *shares, f"{result['seconds']:.0f}", f"{result['wall']:.0f}", f"{result['memory'] / MIB:.0f}",
            f"{result['size'] / MIB:.2f}"]


if __name__ == "__main__":
    main()
