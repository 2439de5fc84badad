"""What arithmetic on files of real size costs, beside copying them: wall time, memory, and how much is lost.

    python -m benchmarks.toolbox [--folder DIR] [--threads 1] [--repeats 3] [--only merge extract]
    python -m benchmarks.toolbox --latency          what a merged adapter costs in use, beside an attached one
    python -m benchmarks.toolbox --others           peft, diffusers and lycoris-lora at the same jobs, beside ours
    python -m benchmarks.toolbox --quick            small networks: does the benchmark run?

Single files of Stable Diffusion 1.5's sizes in fp16, weights drawn at random, are made when they are needed (8 GB):
*base*; *planted*, which is base with rank-24 changes and small noise on all linear layers and convolutions of UNet and
text encoder, once more without the convolutions that have a kernel; and *decaying*, whose changes' singular values fall
as a power law, since a gap below the rank flatters randomised methods.
Each work runs in a process of its own, in turn with copying the base (with fsync); *wall* is the median, *copies* the
median of its ratios to the copy of the same round. *anonymous* is the most memory that is not a file's at any time
(RssAnon, which Linux tells; looked at every 20 ms). *lost*: ‖ΔW − ΔW_r‖ / ‖ΔW‖ of all layers together, and, of a sample
of layers, the greatest ratio of a layer's to the least possible, by full SVDs in fp64.
*naive* is a full SVD in fp32 of each layer of such a sample, its time extrapolated to all by the numbers of weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import MIB, interleave, paired, print_table
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.rewrite import rewrite
from impasto.toolbox.convert import convert
from impasto.toolbox.extract import extract_to
from impasto.toolbox.merge import merge_adapters
from impasto.toolbox.mix import mix, resize

#: of the planted changes, of what is extracted, and of the adapters that are resized, merged and mixed
PLANTED, RANK, WIDE = 24, 32, 64
#: layers of which the least possible error is computed
SAMPLE = 12

#: what is extracted, and from which file
TUNED = {"linear and 1×1, planted": "planted-linear", "all, planted": "planted", "all, decaying": "decaying"}

Work = Callable[[Path, Path], Any]


def works() -> dict[str, Work]:
    """Name -> what is done with the folder of inputs, into an output."""
    return {
        "copy": lambda folder, out: copied(folder / "base.safetensors", out),
        "extract, linear and 1×1, planted": lambda folder, out: extract_to(
            folder / "base.safetensors", folder / "planted-linear.safetensors", out, Wanted(rank=RANK)),
        "extract, all, planted": lambda folder, out: extract_to(
            folder / "base.safetensors", folder / "planted.safetensors", out, Wanted(rank=RANK)),
        "extract, all, decaying": lambda folder, out: extract_to(
            folder / "base.safetensors", folder / "decaying.safetensors", out, Wanted(rank=RANK)),
        "resize 32 to 16": lambda folder, out: resize(folder / "lora32.safetensors", Wanted(rank=16), out),
        "mix of two of rank 64": lambda folder, out: mix(two(folder), out),
        "mix of two of rank 64, to 64": lambda folder, out: mix(two(folder), out, wanted=Wanted(rank=WIDE)),
        "merge a rank-32 LoRA": lambda folder, out: merge_adapters(
            folder / "base.safetensors", [Weighted(str(folder / "lora32.safetensors"))], out),
        "single file to folder": lambda folder, out: convert(folder / "base.safetensors", out.with_suffix("")),
        "folder to single file": lambda folder, out: convert(folder / "folder", out),
    }


def all_works(others: bool) -> dict[str, Work]:
    """Those of `works`, and with `others` those of other programs, each of which follows ours of the same name."""
    found = works()
    if others:
        from benchmarks.toolbox_others import WORKS

        found |= WORKS
    return found


def any_of_others(names: Iterable[str]) -> bool:
    return any(": " in name for name in names)


def two(folder: Path) -> list[Weighted]:
    return [Weighted(str(folder / "lora64.safetensors"), 0.7), Weighted(str(folder / "other64.safetensors"), 0.3)]


def copied(source: Path, out: Path) -> None:
    shutil.copyfile(source, out)
    with open(out, "rb+") as file:
        os.fsync(file.fileno())


# --- inputs ----------------------------------------------------------------------------------------------
def inputs(folder: Path, size: str, names: Iterable[str]) -> None:
    """Make what is not there yet of what works of these names take."""
    from tests.checkpoints import write_checkpoint  # which imports diffusers' networks: memory that no work needs

    base = folder / "base.safetensors"
    if not base.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(base, size=size, dtype=torch.float16)
    if not (folder / "folder").exists():
        convert(base, folder / "folder")
    for name, change in (("planted", planted), ("planted-linear", lambda *of: planted(*of, wide=False)),
                         ("decaying", decaying)):
        if tuned_of(names) >= {name} and not (folder / f"{name}.safetensors").exists():
            rewrite(open_checkpoint(base), folder / f"{name}.safetensors", adding(change))
    for name, rank, seed in (("lora32", 32, 1), ("lora64", WIDE, 2), ("other64", WIDE, 3)):
        if not (folder / f"{name}.safetensors").exists():
            save_adapter(Adapter(dict(factors(base, rank, seed)), family="sd1"), folder / f"{name}.safetensors")


def tuned_of(names: Iterable[str]) -> set[str]:
    """The tuned checkpoints from which works of these names extract."""
    return {TUNED[kind] for kind in TUNED for name in names if name.startswith(f"extract, {kind}")}


def adding(change: Callable[[Tensor, torch.Generator], Tensor | None]) -> Callable[[str, str, Tensor], Tensor | None]:
    def add(component: str, name: str, tensor: Tensor) -> Tensor | None:
        if component == "vae" or not name.endswith(".weight") or tensor.ndim < 2 or "embedding.weight" in name:
            return None
        found = change(tensor, torch.Generator().manual_seed(sum(name.encode())))
        return None if found is None else tensor.float() + found.reshape(tensor.shape)

    return add


def planted(weight: Tensor, draw: torch.Generator, wide: bool = True) -> Tensor | None:
    """Rank 24 and noise, each of size 1e-3 · ‖W‖ or so. Not `wide`: nothing of convolutions with a kernel."""
    rows, columns = weight.shape[0], weight[0].numel()
    if not wide and columns != weight.shape[1]:
        return None
    scale = 0.02 * float(weight.float().std())
    up, down = torch.randn(rows, PLANTED, generator=draw), torch.randn(PLANTED, columns, generator=draw)
    return scale * (up @ down / PLANTED**0.5 + 0.2 * torch.randn(rows, columns, generator=draw))


def decaying(weight: Tensor, draw: torch.Generator) -> Tensor:
    """Singular values k^-0.6 for the first 400, in random directions."""
    rows, columns = weight.shape[0], weight[0].numel()
    count = min(400, rows, columns)
    up, down = torch.randn(rows, count, generator=draw), torch.randn(count, columns, generator=draw)
    values = torch.arange(1.0, count + 1).pow(-0.6)
    return 0.05 * float(weight.float().std()) * ((up * values) @ down)


def factors(base: Path, rank: int, seed: int) -> Iterator[tuple[str, tuple[LowRank]]]:
    """A LoRA of every linear layer and 1×1 convolution."""
    draw = torch.Generator().manual_seed(seed)
    for name, (shape, _) in open_checkpoint(base).names("unet").items():
        if name.endswith(".weight") and len(shape) > 1 and set(shape[2:]) <= {1}:
            ones = (1,) * (len(shape) - 2)
            up = torch.randn(shape[0], rank, *ones, generator=draw) * 0.01
            down = torch.randn(rank, shape[1], *ones, generator=draw) * 0.01
            yield f"unet.{name.removesuffix('.weight')}", (LowRank.from_factors(up, down, float(rank)),)


# --- measuring -------------------------------------------------------------------------------------------
def child(name: str, folder: Path, out: Path, threads: int) -> None:
    """Do one work in this process and print its time, memory and error as JSON."""
    torch.set_num_threads(threads)
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], anonymous())

    work = all_works(any_of_others([name]))[name]  # with the imports that it takes, which are not its own
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    made = work(folder, out)
    wall = time.perf_counter() - started
    done.set()
    watcher.join()
    print(json.dumps({"wall": wall, "anonymous": max(most[0], anonymous()),
                      "error": made.error if getattr(made, "layers", None) else None}))


def anonymous() -> int:
    """Bytes of this process's memory that are no file's, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measured(name: str, folder: Path, out: Path, threads: int) -> dict[str, Any]:
    for left in (out, out.with_suffix("")):
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "benchmarks.toolbox", "--folder", str(folder), "--threads",
                           str(threads), "--child", name, str(out)], check=True, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE if any_of_others([name]) else None,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def against_the_least(folder: Path, out: Path, tuned: str) -> tuple[float, float]:
    """Of a sample of layers: the greatest ratio of what was lost to the least possible; and the time of full SVDs in
    fp32, extrapolated to all layers by their sizes (m · n · min(m, n))."""
    adapter = load_adapter(out)
    first, second = open_checkpoint(folder / "base.safetensors"), open_checkpoint(folder / tuned)
    layers = [layer for layer in adapter.layers if layer.startswith("unet.")]
    worst, spent, looked, whole = 0.0, 0.0, 0.0, 0.0
    for i, layer in enumerate(layers):
        shape = adapter.deltas[layer][0].shape
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        cost = rows * columns * min(rows, columns)
        whole += cost
        if i % max(len(layers) // SAMPLE, 1):
            continue
        name = layer.removeprefix("unet.") + ".weight"
        one, other = (checkpoint.tensor("unet", name) for checkpoint in (first, second))
        change = (other.float() - one.float()).flatten(1)
        started = time.perf_counter()
        torch.linalg.svd(change, full_matrices=False)
        spent, looked = spent + time.perf_counter() - started, looked + cost
        values = torch.linalg.svdvals(change.double())
        least = float(values[RANK:].square().sum().sqrt())
        found = float((adapter.dense(layer).flatten(1).double() - change.double()).norm())
        if min(rows, columns) > RANK:  # else nothing is lost but rounding
            worst = max(worst, found / least)
    return worst, spent * whole / looked


@torch.no_grad()
def latency(quick: bool, threads: int, repeats: int) -> None:
    """Print the time of the UNet's forward pass at 256²: plain, with a rank-16 LoRA on 192 layers, and that merged."""
    from benchmarks.step import build_unet, inputs, twin
    from benchmarks.wrapped import KINDS, targets
    from impasto.deltas.attach import attach
    from impasto.deltas.layers import shape_of
    from impasto.families.lean import lean

    device = torch.device("cpu")
    base = build_unet(quick, device)
    unets = {"base": base, "attached": twin(base, quick), "merged": copy.deepcopy(base)}
    deltas = {path: KINDS["lora"](shape_of(layer)).requires_grad_(False)
              for path, layer in targets(base, "linear").items()}
    for unet in unets.values():
        lean(unet)
    attach(unets["attached"], deltas)
    attach(unets["merged"], deltas).merge()
    data = inputs(256, base, device)

    def forward(unet: Any) -> None:
        unet(data["latents"], data["time"], data["text"])

    timings = interleave({name: lambda unet=unet: forward(unet) for name, unet in unets.items()}, repeats, device)
    print(f"\nforward at 256², {threads} thread(s), {repeats} rounds\n")
    print_table(["UNet", "s", "ratio"], [[name, f"{statistics.median(timing.wall):.3f}",
                                         f"{paired(timing.wall, timings['base'].wall):.3f}"]
                                        for name, timing in timings.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the files; default: runs/toolbox, or runs/toolbox-quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="works whose names begin so")
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--no-least", action="store_true", help="leave the full SVDs out, which take minutes")
    parser.add_argument("--others", action="store_true", help="other programs at the jobs that they can do, and ours")
    parser.add_argument("--latency", action="store_true", help="the UNet's time with and without an adapter")
    parser.add_argument("--child", nargs=2, metavar=("WORK", "OUT"), help=argparse.SUPPRESS)
    told = parser.parse_args()
    folder = told.folder or Path("runs/toolbox-quick" if told.quick else "runs/toolbox")
    if told.child:
        return child(told.child[0], folder, Path(told.child[1]), told.threads)
    torch.set_num_threads(told.threads)
    if told.latency:
        return latency(told.quick, told.threads, told.repeats)
    names = list(all_works(told.others))
    if told.others:  # and ours at the same job
        named = {name.partition(": ")[0] for name in names if any_of_others([name])}
        names = sorted((name for name in names if name.partition(": ")[0] in {"copy", *named}),
                       key=lambda name: list(works()).index(name.partition(": ")[0]))
    names = [name for name in names if name == "copy" or not told.only or name.startswith(tuple(told.only))]
    size = "mini" if told.quick else "real"
    inputs(folder, size, names)
    if told.others:
        from benchmarks.toolbox_others import inputs as more

        more(folder)
    out = folder / "out.safetensors"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    least: dict[str, tuple[float, float]] = {}
    for round_ in range(told.repeats):
        for name in names:
            try:
                found[name].append(measured(name, folder, out, told.threads))
            except subprocess.CalledProcessError as error:
                if not any_of_others([name]):
                    raise
                print(f"{name}: fails on these files, {error.stderr.strip().splitlines()[-1]}")
                continue
            if name.startswith("extract") and not told.no_least and round_ == told.repeats - 1:
                (tuned,) = tuned_of([name])
                least[name] = against_the_least(folder, out, f"{tuned}.safetensors")
    rows = []
    for name, runs in found.items():
        if len(runs) < told.repeats:
            continue
        ratios = [run["wall"] / copy["wall"] for run, copy in zip(runs, found["copy"], strict=True)]
        error, (worst, naive) = runs[-1]["error"], least.get(name, (0.0, 0.0))
        rows.append([name, f"{statistics.median(run['wall'] for run in runs):.1f}", f"{statistics.median(ratios):.2f}",
                     f"{max(run['anonymous'] for run in runs) / MIB:.0f}", "" if error is None else f"{error:.4f}",
                     f"{worst:.4f}" if worst else "", f"{naive:.0f}" if naive else ""])
    print(f"\n{told.threads} thread(s), {told.repeats} rounds\n")
    print_table(["work", "wall, s", "copies", "anonymous, MiB", "lost", "of the least", "naive, s"], rows)


if __name__ == "__main__":
    main()
