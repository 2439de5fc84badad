"""What a run's data cost: finding and checking pictures, encoding them once, reading batches, and memory.

    python -m benchmarks.data [--pictures 10000] [--side 256] [--samples 1000000] [--http]
                              [--only pictures|samples|copies]

`--pictures`: generated JPEGs with captions, the same ones in a folder and in shards of 1,000; encoded with the
embedded base's VAE at 64x64. Batches are read as pixels (decoded, resized and cut in each step, as for training a VAE)
and as latents, beside a plain PyTorch DataLoader over the same files that decodes, resizes and crops with Pillow.

`--samples`: tiny PNGs in shards of 10,000. Memory is what the process holds of its own (resident, less what is mapped
from files), in a fresh process for each number of samples, above what it holds once everything is imported. Near-copies
are looked for among as many random hashes, of which one in a hundred has a near one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import MIB, print_table
from impasto.data.options import DataOptions

#: pictures in a shard, tiny ones in theirs, pictures in a batch, and batches that are timed
SHARD, TINY_SHARD, BATCH, BATCHES = 1000, 10_000, 8, 60
#: side that pictures are trained at, pixels
SIDE = 64
#: long enough ago that files are remembered
OLD = 1_600_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, pixels")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--http", action="store_true", help="the shards over a web server on this machine too")
    parser.add_argument("--only", choices=["pictures", "samples", "copies"])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure is not None:
        print(json.dumps(measure_memory(chosen.measure)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["IMPASTO_CACHE"] = str(Path(name) / "cache")
        if chosen.only in (None, "pictures"):
            pictures(Path(name), chosen.pictures, chosen.side, chosen.http)
        if chosen.only in (None, "samples"):
            samples(Path(name), chosen.samples)
        if chosen.only in (None, "copies"):
            copies(chosen.samples)


# --- pictures ----------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int, side: int, http: bool) -> None:
    """The table of a set of ordinary size."""
    draw_pictures(folder / "photos", count, side)
    pack(folder / "photos", folder / "shards")
    sources: dict[str, DataOptions] = {
        "folder": options(folder=str(folder / "photos")),
        "shards": options(source="shards", shards=str(folder / "shards"), cache=str(folder / "local")),
    }
    with contextlib.ExitStack() as stack:
        if http:
            from tests.data.sharded import serving

            address = stack.enter_context(serving(folder / "shards")).address
            names = [f"{address}/{path.name}" for path in sorted((folder / "shards").glob("*.tar"))]
            sources["shards, HTTP"] = options(source="shards", shards=names, cache=str(folder / "http"))
        rows = [[name, *(f"{seconds:.1f}" for seconds in prepare_times(data)), *read_rates(data)]
                for name, data in sources.items()]
    for workers in (0, 2):
        rate = loader_rate(folder / "photos", workers)
        rows.append([f"PyTorch DataLoader, {workers} workers", *[""] * 5, f"{rate:.0f}", ""])
    print(f"{count:,} pictures of {side}x{side}, batches of {BATCH}")
    print_table(["source", "s, index", "s, index again", "s, check", "s, encode", "s, prepare again",
                 "pictures/s, pixels", "pictures/s, latents"], rows)


def options(**keys: Any) -> DataOptions:
    return DataOptions.model_validate({"resolution": SIDE, "bucket_step": 8, **keys})


def draw_pictures(folder: Path, count: int, side: int) -> None:
    """Smooth pictures, no two alike, as JPEG."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / f"{i:06d}.jpg"
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
        path.with_suffix(".txt").write_text(f"picture number {i}")
        os.utime(path, (OLD, OLD))


def pack(photos: Path, folder: Path) -> None:
    """The same pictures and captions in shards."""
    folder.mkdir()
    names = sorted(path.stem for path in photos.glob("*.jpg"))
    for start in range(0, len(names), SHARD):
        path = folder / f"{start // SHARD:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for name in names[start:start + SHARD]:
                for kind in (".jpg", ".txt"):
                    tar.add(photos / f"{name}{kind}", f"{name}{kind}")
        os.utime(path, (OLD, OLD))


def prepare_times(data: DataOptions) -> list[float]:
    """Seconds to look at all pictures, the same once they are known, to check them, to encode them, and to begin again.
    """
    from impasto.data.check import check
    from impasto.data.inventory import take_inventories
    from impasto.data.pictures import pictures_of
    from impasto.data.shards.check import check_shards

    def checked() -> object:
        if data.source == "shards":
            return check_shards(data, BATCH)
        return [check(inventory) for inventory in take_inventories(data, None, BATCH)]

    def looked() -> object:
        return pictures_of(data, None, None, 0)

    def ready() -> object:
        return prepared(data, "unet")

    return [timed(each) for each in (looked, looked, checked, ready, ready)]


def prepared(data: DataOptions, trains: str) -> Any:
    """A run's source on the embedded base."""
    import impasto
    from impasto.data.source import prepare_source

    return prepare_source(impasto.load_base("mini"), data, None, trains=frozenset({trains}), batch_size=BATCH,
                          accumulation=1, seed=0, device="cpu")


def read_rates(data: DataOptions) -> list[str]:
    """Pictures a second as pixels, and as latents."""
    return [f"{rate(source_batches(prepared(data, trains))):.0f}" for trains in ("vae", "unet")]


def source_batches(source: Any) -> Iterator[object]:
    step = 0
    while True:
        yield source.micro_batches(step)
        step += 1


def loader_rate(folder: Path, workers: int) -> float:
    """Pictures a second of a plain DataLoader."""
    loader = DataLoader(Plain(folder), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def endless() -> Iterator[object]:
        while True:
            yield from loader

    return rate(endless())


class Plain(Dataset):
    """What a training script writes: open, convert, resize, crop."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        path = self.paths[i]
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return pixels, path.with_suffix(".txt").read_text()


def rate(batches: Iterator[object]) -> float:
    """Pictures a second over BATCHES batches; the first ones start threads and workers."""
    for _ in range(5):
        next(batches)
    seconds = timed(lambda: [next(batches) for _ in range(BATCHES)])
    return BATCHES * BATCH / seconds


def timed(what: Callable[[], object]) -> float:
    """Seconds on the wall."""
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


# --- memory ------------------------------------------------------------------------------------------------


def samples(folder: Path, count: int) -> None:
    """The table of memory."""
    rows = []
    tiny = tiny_pictures()
    for number in (count // 100, count // 10, count):
        place = folder / f"tiny-{number}"
        pack_tiny(place, number, tiny)
        shown = subprocess.run([sys.executable, "-m", "benchmarks.data", "--measure", str(place)], text=True,
                               stdout=subprocess.PIPE, check=True)
        found = json.loads(shown.stdout)
        seconds = (f"{found['index']:.1f}", f"{found['open']:.2f}", f"{found['epoch']:.2f}")
        rows.append([f"{number:,}", *seconds, f"{found['read_memory'] / MIB:.1f}", f"{found['memory'] / MIB:.1f}",
                     f"{found['mapped'] / MIB:.0f}"])
        for path in place.glob("*.tar"):
            path.unlink()
    print_table(["samples", "s, index", "s, open again", "s, order of an epoch", "MiB while reading", "MiB in the run",
                 "MiB mapped"], rows)


def tiny_pictures() -> list[bytes]:
    """A few thousand different PNGs of 8x8."""
    rng, made = np.random.default_rng(0), []
    for _ in range(4096):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG", compress_level=1)
        made.append(file.getvalue())
    return made


def pack_tiny(folder: Path, count: int, tiny: list[bytes]) -> None:
    """So many samples with captions of their own."""
    folder.mkdir()
    rng = random.Random(0)
    for start in range(0, count, TINY_SHARD):
        path = folder / f"{start // TINY_SHARD:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(start, min(start + TINY_SHARD, count)):
                words = " ".join(rng.choices(("a", "red", "blue", "small", "house", "dog", "hat", "field"), k=8))
                for kind, data in (("png", tiny[i % len(tiny)]), ("txt", f"{words}, number {i}".encode())):
                    info = tarfile.TarInfo(f"{i:08d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        os.utime(path, (OLD, OLD))


def copies(most: int) -> None:
    """The table of near-copies, up to `most` pictures."""
    from impasto.data.similar import grouped

    rows = []
    for count in (most // 100, most // 10, most):
        rng = np.random.default_rng(0)
        values = rng.integers(0, 2**64, count, dtype=np.uint64)
        near = count // 100
        values[-near:] = values[:near] ^ np.uint64(0b10010001)
        colours = rng.integers(0, 256, (count, 48), dtype=np.uint8)
        colours[-near:] = colours[:near]
        started = time.perf_counter()
        group, whole = grouped(values, colours)
        seconds = time.perf_counter() - started
        found = int((group[-near:] == np.arange(near)).sum())
        rows.append([f"{count:,}", f"{seconds:.1f}", f"{found:,} of {near:,}", "all" if whole else "some"])
    print()
    print_table(["pictures", "s, near-copies", "found", "pairs compared"], rows)


def own_memory() -> int:
    """Bytes of memory that are this process's alone and no file's."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def measure_memory(folder: Path) -> dict[str, float]:
    """What one process takes: reading the shards, opening them again, an epoch's order, and a thousand steps of it."""
    from impasto.data.shards.items import shard_items
    from impasto.data.shards.table import open_table

    torch.set_num_threads(1)
    data = DataOptions.model_validate({"source": "shards", "shards": str(folder), "resolution": 8, "bucket_step": 8})
    torch.randperm(1000)
    before = own_memory()
    index = timed(lambda: open_table(data))
    read_memory = own_memory() - before
    started = time.perf_counter()
    items = shard_items(data)
    opened = time.perf_counter() - started
    order = items.order(BATCH, 0, "pictures")
    epoch = timed(lambda: order.micro_batch(0))
    for step in range(1000):
        for place in order.micro_batch(step):
            items[place].picture.read()
    mapped = sum(path.stat().st_size for path in (Path(os.environ["IMPASTO_CACHE"]) / "shards").glob("*.safetensors"))
    return {"index": index, "open": opened, "epoch": epoch, "read_memory": read_memory, "memory": own_memory() - before,
            "mapped": mapped}


if __name__ == "__main__":
    main()
