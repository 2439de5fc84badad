"""`impasto doctor`: what this machine has for fine-tuning, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from impasto.cli.console import RichReporter, can_show, emit, size
from impasto.cli.options import Json
from impasto.core.files import cache_dir, nearest_folder

#: below this much free space a run's checkpoints and caches may not fit
LITTLE_DISK = 10 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fix` is what to do about it, if anything."""

    name: str
    ok: bool
    text: str
    fix: str = ""


def doctor(
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure first how fast a training can be here, in "
                                            "about a minute; impasto plan then tells times.")] = False,
    device: Annotated[str, typer.Option(help="What to measure: auto, cuda, mps, cpu, or one such as cuda:1.")] = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|fp32|bf16|fp16", help="In which precision.")] = "auto",
    as_json: Json = False,
) -> None:
    """Look at this machine: devices, precision, packages, disk."""
    if calibrate:
        _calibrate(device, precision)
    with RichReporter().phase("looking around"):
        found = [*_system(), *_devices(), *_speeds(), *_packages(), *_disk(), _hub(), *_forecasts()]
    if as_json:
        emit({"ok": all(f.ok for f in found), "findings": [asdict(f) for f in found]})
        return
    good, bad = ("✓", "!") if can_show("✓", sys.stdout) else ("ok", "! ")
    width = max(len(f.name) for f in found)
    for finding in found:
        print(f"{good if finding.ok else bad} {finding.name:<{width}}  {finding.text}")
        if finding.fix:
            print(f"{' ' * (len(good) + width + 3)}-> {finding.fix}")


def _system() -> Iterator[Finding]:
    import psutil

    yield Finding("Python", True, f"{platform.python_version()} on {platform.platform(terse=True)}")
    memory = psutil.virtual_memory()
    yield Finding("memory", memory.available > 4 * 2**30,
                  f"{size(memory.total)}, {size(memory.available)} free, {os.cpu_count()} processors")


def _devices() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0) or torch.version.hip is not None
        precision = "bf16" if bf16 else "no bf16: training takes fp16 with loss scaling"
        yield Finding(f"cuda:{index}", True, f"{torch.cuda.get_device_name(index)}, {size(total)}, {size(free)} free, "
                                             f"{precision}")
    if torch.backends.mps.is_available():
        yield Finding("mps", True, f"Apple GPU, {size(torch.mps.recommended_max_memory())} advised at most")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        yield Finding("cuda", False, f"there is an NVIDIA driver, but torch {torch.__version__} finds no device",
                      "install a CUDA build of torch: https://pytorch.org/get-started/locally")
    ratio = half_precision_gain()
    verdict = "use fp32 here" if ratio < 1 else "bf16 is worth trying"
    yield Finding("cpu", True, f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; a "
                               f"matrix product in bf16 is {_times(ratio)} than in fp32: {verdict}")


def _calibrate(device: str, precision: str) -> None:
    """Measure and keep a device's speed. Raises `UserError` for one that is not there, or lacks the precision."""
    from impasto.core.errors import UserError, nearest
    from impasto.planning import time as pace
    from impasto.training.environment import DTYPES, choose_device

    if precision not in ("auto", *DTYPES):
        raise UserError(f"there is no precision {precision!r}", where="--precision", fix=nearest(precision, DTYPES))
    pace.calibrate(choose_device(device), precision, RichReporter())


def _speeds() -> Iterator[Finding]:
    """What was measured on this machine, and what part of a known card's figures that is."""
    from impasto.core.errors import UserError
    from impasto.planning.cards import card_of
    from impasto.planning.time import kept

    for speed in kept():
        of_products = of_memory = ""
        try:
            card = card_of(speed.name)
            if paper := card.tflops.get(speed.precision):
                of_products = f" ({speed.flops / paper / 1e12:.0%} of the card's {paper:g})"
                of_memory = f" ({speed.bandwidth / card.bandwidth / 1e9:.0%} of {card.bandwidth:g})"
        except UserError:
            pass  # a CPU, or a card that is not in the table
        products = f"{speed.flops / 1e12:.3g} TFLOPS" if speed.flops >= 1e12 else f"{speed.flops / 1e9:.3g} GFLOPS"
        yield Finding("speed", True, f"{speed.name}, {speed.precision}: {products} in products{of_products}, "
                                     f"{speed.bandwidth / 1e9:.3g} GB/s in the rest{of_memory}")


def _forecasts() -> Iterator[Finding]:
    """How far forecasts of memory were from what runs took; nothing before the first."""
    from impasto.planning.drift import seen

    if (drift := seen()) is not None:
        yield Finding("forecasts", abs(drift.median) < 0.05, drift.summary(), "" if abs(drift.median) < 0.05 else
                      "tell the authors: forecasts of memory are meant to be within 5%")


def half_precision_gain(side: int = 384) -> float:
    """fp32's time of a matrix product on the CPU over bf16's, each the best of three."""
    import torch

    def best(dtype: torch.dtype) -> float:
        a = torch.ones(side, side, dtype=dtype)
        times = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return best(torch.float32) / best(torch.bfloat16)


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times faster" if ratio >= 1 else f"{1 / ratio:.2g} times slower"


def _packages() -> Iterator[Finding]:
    """Each dependency of the installed package against the range that it asks for; then the extras."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("impasto") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", False, "impasto runs from a folder and is not installed", "pip install -e .")
        return
    extras: dict[str, list[Requirement]] = {}
    for requirement in requirements:
        extra = str(requirement.marker).partition('extra == "')[2].partition('"')[0] if requirement.marker else ""
        if extra:
            extras.setdefault(extra, []).append(requirement)
        elif requirement.marker is None or requirement.marker.evaluate():
            version = _version(requirement.name)
            ok = version is not None and requirement.specifier.contains(version, prereleases=True)
            yield Finding(requirement.name, ok, version or "missing",
                          "" if ok else f"pip install '{requirement.name}{requirement.specifier}'")
    for extra, needs in extras.items():
        missing = [r.name for r in needs if _version(r.name) is None]
        if extra != "dev":
            yield Finding(f"extra {extra}", True, f"without {', '.join(missing)}" if missing else "installed",
                          f"pip install 'impasto[{extra}]' if you want it" if missing else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk() -> Iterator[Finding]:
    for name, folder in (("cache", cache_dir()), ("this folder", Path.cwd())):
        free = shutil.disk_usage(nearest_folder(folder)).free
        ok = free >= LITTLE_DISK and os.access(nearest_folder(folder), os.W_OK)
        yield Finding(name, ok, f"{folder}, {size(free)} free", "" if ok else
                      "free some space, or set IMPASTO_CACHE to another place" if name == "cache" else
                      "choose an output.dir with more space that you may write to")


def _hub() -> Finding:
    """The Hugging Face cache, where hub ids are looked up."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    count = sum(1 for _ in folder.glob("models--*"))
    offline = "; HF_HUB_OFFLINE is set: nothing is downloaded" if constants.HF_HUB_OFFLINE else ""
    return Finding("hub cache", True, f"{folder}, {count} models{offline}")
