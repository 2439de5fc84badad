"""What the benchmarks share: fair timing, trustworthy memory, and a table."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """One variant's times over the rounds, in seconds: by the wall, and of the processor (on a CPU)."""

    wall: list[float]
    processor: list[float]


def interleave(steps: Mapping[str, Callable[[], None]], rounds: int,
               device: torch.device) -> dict[str, Timing]:
    """Time each step once per round, A B C A B C, each round starting one further along.

    One uncounted round warms up. Interleaving lets a noisy neighbour or a clock that drifts hit all alike.
    """
    names = list(steps)
    timings = {name: Timing([], []) for name in names}
    for round_ in range(-1, rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            wall, processor = time.perf_counter(), time.process_time()
            steps[name]()
            synchronize(device)
            if round_ >= 0:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].processor.append(time.process_time() - processor)
    return timings


def paired(times: Sequence[float], floor: Sequence[float]) -> float:
    """The median over the rounds of each round's own ratio to the floor."""
    return statistics.median(t / f for t, f in zip(times, floor, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_allocated(step: Callable[[], None], device: torch.device) -> int:
    """Peak bytes of tensors over two steps, the first of which makes the optimizer's state; weights included.

    On a CPU the profiler's allocation events are added up: exact and repeatable, but blind to the scratch that
    oneDNN and MKL take for themselves (peak RSS sees it). On CUDA the caching allocator counts.
    """
    held = bytes_of(tensors_on(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(), step()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(), step()
    assert recorded.profiler is not None
    now = peak = held
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def tensors_on(device: torch.device) -> list[torch.Tensor]:
    """All tensors on `device` that Python can see now; fake ones are nowhere."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)
            and not issubclass(type(thing), FakeTensor) and thing.device.type == device.type]


def bytes_of(tensors: Sequence[torch.Tensor]) -> int:
    """Their bytes, each storage once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in (one.untyped_storage() for one in tensors)}
               .values())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table: the first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    print(line(header))
    print("|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    for row in rows:
        print(line(row))
