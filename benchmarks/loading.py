"""What opening a checkpoint of real size costs: time beside reading the file, and memory beside what is held.

    python -m benchmarks.loading --families sd1 sdxl --threads 1

Random weights in fp16, in a single file of the family's real size. Each load runs in a process of its own, from the
disk. Memory is the peak of what the process has for itself (anonymous) and of all that it has mapped (the file's pages
among it, which the system takes back when it needs them); both without what it had before, and as a share of the
weights that are held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["sd1", "sd2", "sdxl", "sdxl-refiner"])
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "fp32"], choices=DTYPES)
    parser.add_argument("--folder", type=Path, default=Path("runs/loading"), help="where the files are made")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "DTYPE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.one:
        print(json.dumps(loaded(Path(chosen.one[0]), chosen.one[1])))
        return
    from tests.checkpoints import write_large

    print(f"{chosen.threads} thread(s)\n")
    print("| base | file | read | loaded as | time | of reading | anonymous | mapped too |")
    print("|---|--:|--:|---|--:|--:|--:|--:|")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for family in chosen.families:
        path = chosen.folder / f"{family}.safetensors"
        if not path.exists():
            write_large(path, family)
        for dtype in chosen.dtypes:
            read = reading(path)
            told = json.loads(subprocess.run(
                [sys.executable, "-m", "benchmarks.loading", "--threads", str(chosen.threads), "--one", path, dtype],
                check=True, capture_output=True, text=True).stdout)
            shares = (told["seconds"] / read, told["anonymous"] / told["held"], told["mapped"] / told["held"])
            size = path.stat().st_size / 1e9
            print(f"| {family} | {size:.2f} GB | {read:.1f} s | {dtype} | {told['seconds']:.1f} s | "
                  + " | ".join(f"{share:.2f}" for share in shares) + " |", flush=True)
        path.unlink()


def reading(path: Path) -> float:
    """Seconds to read the file from the disk into a buffer."""
    forget(path)
    buffer = bytearray(1 << 24)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def forget(path: Path) -> None:
    """Have the system drop what it keeps of the file in memory."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loaded(path: Path, dtype: str) -> dict[str, float]:
    """Load a base, and look at all of its weights, which are mapped from the file where their type is that of the file.

    Its time, what it holds, and the peak of memory meanwhile, in bytes above what was there before.
    """
    from impasto.families import FAMILIES
    from impasto.families.load import load_base

    for family in FAMILIES:
        FAMILIES.get(family)  # imports its libraries, which is not to be counted
    forget(path)
    before, peak, over = memory(), [0, 0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[:] = [max(a, b) for a, b in zip(peak, memory(), strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    base = load_base(path, dtype=DTYPES[dtype])
    for module in base.components.values():
        for weight in module.parameters():
            weight.view(torch.uint8).flatten()[::4096].sum()
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    held = sum(p.numel() * p.element_size() for m in base.components.values() for p in m.parameters())
    return {"seconds": seconds, "held": held, "anonymous": peak[0] - before[0], "mapped": peak[1] - before[1]}


def memory() -> tuple[int, int]:
    """Bytes that are the process's own, and all that it has in memory."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return tuple(1024 * int(rows[key].split()[0]) for key in ("RssAnon", "VmRSS"))  # pyright: ignore


if __name__ == "__main__":
    main()
