"""What a run takes of its device's memory, as the allocator counts it: forecasts are held against that."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

#: steps that are counted on a CPU: the second one finds the optimizer's states
STEPS = 2


class Count:
    """The most bytes of tensors: on a GPU in the whole run; on a CPU in its first steps, if they are to be counted.

    A CPU's allocator keeps no count, but tells the profiler of each allocation, which costs time. The scratch that
    oneDNN and MKL take for themselves it does not see.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self.device = device
        self.left = STEPS if wanted and device.type == "cpu" else 0
        self.most: int | None = None
        self.recorder: profile | None = None

    def __enter__(self) -> Count:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def begin(self) -> None:
        """To be called before the first step."""
        if self.left:
            self.held = bytes_of(tensors_on(self.device))
            self.recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            old = torch.empty(1)
            with _silence():
                self.recorder.start()
                del old  # of the first that it has not seen made it warns

    def stepped(self) -> None:
        """To be called after each step."""
        self.left -= 1
        if self.left == 0:
            self._end()

    def _end(self) -> None:
        if self.recorder is not None:
            with _silence():
                self.recorder.stop()
            self.most, self.recorder = most(self.recorder, self.held), None

    def figures(self) -> dict[str, int]:
        """"allocated" and, of a GPU, "reserved", in bytes; nothing where nothing was counted."""
        if self.device.type == "cuda":
            return {"allocated": torch.cuda.max_memory_allocated(self.device),
                    "reserved": torch.cuda.max_memory_reserved(self.device)}
        return {} if self.most is None else {"allocated": self.most}


def peak_allocated(step: Callable[[], None], device: torch.device) -> int:
    """Peak bytes of tensors over two calls, the first of which makes the optimizer's states; weights included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Count(device, wanted=True) as count:
        count.begin()
        for _ in range(STEPS):
            step()
            count.stepped()
    return count.figures()["allocated"]


def most(recorded: profile, held: int) -> int:
    """The most bytes at a time that a finished recording tells of, which began with `held` bytes."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    now = peak = held
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore
            peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """A block in which what libraries write past Python goes nowhere: the profiler tells that it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def tensors_on(device: torch.device) -> list[torch.Tensor]:
    """All tensors on `device` that Python can see now; fake ones are nowhere."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)
            and thing.layout == torch.strided and thing.untyped_storage().device.type == device.type]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Their bytes, each storage once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in (one.untyped_storage() for one in tensors)}
               .values())
