"""Several processes that train as one: N of them take the draws of one process with N times the batch.

    torchrun --nproc-per-node 2 -m impasto train RECIPE.toml        or: accelerate launch --num-processes 2 …

Every process holds all weights and the whole optimizer. Each takes its places of every batch; gradients are added up
before the optimizer sees them, so that all take the same step. The first one writes, and speaks.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from impasto.core.errors import UserError

#: gradients travel together in messages of so many numbers
MESSAGE = 2**24

#: how long one waits for another, which may be drawing previews or writing; a process that has died is noticed at once
PATIENCE = datetime.timedelta(hours=1)


class Processes:
    """Those that train together, and which of them this one is. Alone, all of it does nothing."""

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0) -> None:
        self.rank, self.count, self.local = rank, count, local

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: str = "auto") -> Iterator[Processes]:
        """Join those that the launcher has started beside this one, for the length of the block.

        Over gloo on a CPU and NCCL on CUDA, as accelerate finds them.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        try:
            yield cls(state.process_index, state.num_processes, state.local_process_index)
        finally:
            with contextlib.suppress(RuntimeError, ValueError):  # whatever of it is left
                dist.destroy_process_group()
            PartialState._reset_state()

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of that name that is this process's own: of several GPUs, each takes one."""
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return name

    def compared(self, manifest: Mapping[str, Any], group: int, folder: Path) -> list[str]:
        """What of a checkpoint's manifest is otherwise now, in lines for the user.

        `group` counts the pictures that all processes take at once. Raises `UserError` if it is another number:
        the order of pictures hangs on it.
        """
        if (before := manifest.get("group", group)) != group:
            told = f"batches of {before} pictures in all processes -> {group}"
            raise UserError(f"holds a run with another recipe ({told})", where=folder, fix="choose another "
                            "output.dir, or put train.batch_size, or the number of processes, back")
        if (count := manifest.get("processes", 1)) == self.count:
            return []
        return [f"processes were {count} and are {self.count}: the same draws, but sums may differ in their last bits"]

    # --- what is done together ---------------------------------------------------------------------------
    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the sum over all processes in each gradient's place."""
        if self.count == 1:
            return
        waiting: list[nn.Parameter] = []
        for parameter in parameters:
            waiting.append(parameter)
            if sum(p.numel() for p in waiting) >= MESSAGE:
                self._add(waiting)
                waiting = []
        if waiting:
            self._add(waiting)

    def _add(self, parameters: Sequence[nn.Parameter]) -> None:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        self._together(dist.all_reduce, flat)
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(total.view_as(parameter))
            elif total.count_nonzero():
                parameter.grad = total.view_as(parameter).clone()

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            self._together(dist.all_reduce, value)
        return value

    def gathered(self, own: Any) -> list[Any]:
        """What each process has, in their order; small things only."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        self._together(dist.all_gather_object, found, own)
        return found

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """All go on after the block, or none: what one cannot do ends the others too, instead of a long wait."""
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = [rank for rank, bad in enumerate(self.gathered(error is not None)) if bad]
        if error is not None:
            raise error
        if failed:
            raise UserError(f"process {failed[0]} of this run cannot go on", fix="its own message says why")

    def _together(self, what: Any, *arguments: Any) -> None:
        try:
            what(*arguments)
        except RuntimeError as error:  # gloo's and NCCL's own words are of sockets
            raise UserError("another process of this run has ended", where=f"process {self.rank}",
                            fix="its own message says why; the same command goes on after the last checkpoint"
                            ) from error
