"""How long the command line takes to answer: medians over fresh processes.

    python -m benchmarks.start [--runs 9]

Each command runs in a new interpreter, in turn (A B C A B C …) so that whatever else the machine does hits all
alike; one uncounted round fills the disk's cache. "over Python" is what is left of the time of an interpreter
that does nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import print_table
from tests.checkpoints import write_checkpoint

FLOOR = "python -c pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        mini = write_checkpoint(Path(folder) / "mini.safetensors")
        times = measure(commands(mini), runs)
    floor = statistics.median(times[FLOOR])
    print_table(["command", "median ms", "slowest ms", "over Python ms"],
                [[name, f"{1e3 * statistics.median(t):.0f}", f"{1e3 * max(t):.0f}",
                  f"{1e3 * (statistics.median(t) - floor):.0f}"] for name, t in times.items()])


def commands(mini: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    impasto = [sys.executable, "-m", "impasto"]
    return {
        FLOOR: [sys.executable, "-c", "pass"],
        "python -c 'import impasto'": [sys.executable, "-c", "import impasto"],
        "impasto --help": [*impasto, "--help"],
        "impasto train --help": [*impasto, "train", "--help"],
        "impasto generate --help": [*impasto, "generate", "--help"],
        "impasto inspect mini.safetensors": [*impasto, "inspect", str(mini)],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }


def measure(what: dict[str, list[str]], runs: int) -> dict[str, list[float]]:
    """Seconds of each command, `runs` times, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for round_ in range(-1, runs):
        for name, command in what.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
