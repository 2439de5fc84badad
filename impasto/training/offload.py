"""What waits in the computer's memory while the device is busy with other things: activations, and optimizer states.

On a device without memory of its own all of it stays where it is, and goes the same ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: bytes from which on an activation is worth the way
LEAST = 2**20


def to_host(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """A copy in the computer's memory, or the tensor itself where it is there. From CUDA into pinned memory, in the
    stream's turn: who reads it on the CPU waits for the stream first."""
    if tensor.device.type == "cpu":
        return tensor
    if into is None:
        into = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return into.copy_(tensor, non_blocking=tensor.device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from pinned memory in the stream's turn."""
    return tensor.to(device, non_blocking=True)


# --- activations -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Away:
    host: Tensor
    device: torch.device


class Activations:
    """What the forward keeps for the backward waits elsewhere; weights, which are there in any case, do not.

    Each comes back when the backward asks for it (torch's `save_on_cpu` does so with weights too, and with each use of
    a tensor by itself). `send` and `bring` are the ways there and back.
    """

    def __init__(self, weights: Callable[[], Iterable[Tensor]], *, send: Callable[[Tensor], Tensor] = to_host,
                 bring: Callable[[Tensor, torch.device], Tensor] = to_device, least: int = LEAST) -> None:
        self._weights, self._send, self._bring, self._least = weights, send, bring, least

    @contextmanager
    def away(self) -> Iterator[None]:
        """A block with a forward, whose backward may come after it."""
        stay = {_storage(tensor) for tensor in self._weights()}
        last: list[tuple[Tensor, _Away]] = []  # kept alive, so that nothing else can lie where it does

        def pack(tensor: Tensor) -> Tensor | _Away:
            if tensor.nbytes < self._least or _storage(tensor) in stay:
                return tensor
            if not last or not _same(last[0][0], tensor):  # queries, keys and values are made of one
                last[:] = [(tensor, _Away(self._send(tensor), tensor.device))]
            return last[0][1]

        def unpack(packed: Tensor | _Away) -> Tensor:
            return packed if isinstance(packed, Tensor) else self._bring(packed.host, packed.device)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        last.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(one: Tensor, other: Tensor) -> bool:
    return (_storage(one), one.storage_offset(), one.shape, one.stride(), one.dtype, one._version) == (
        _storage(other), other.storage_offset(), other.shape, other.stride(), other.dtype, other._version)


# --- optimizer states --------------------------------------------------------------------------------------


class States:
    """An optimizer's states wait elsewhere; those of some weights are on the device for the length of their step."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, send: Callable[..., Tensor] = to_host,
                 bring: Callable[[Tensor, torch.device], Tensor] = to_device) -> None:
        self.optimizer, self._send, self._bring = optimizer, send, bring
        self._homes: dict[tuple[nn.Parameter, str], Tensor] = {}

    @contextmanager
    def here(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """A block in which the optimizer may step these weights."""
        parameters = list(parameters)
        for parameter in parameters:
            entry = self.optimizer.state.get(parameter, {})
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    entry[key] = self._bring(value, parameter.device)
        yield
        self.leave(parameters)

    def leave(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let these weights' states wait elsewhere from now on."""
        for parameter in parameters:
            entry = self.optimizer.state.get(parameter, {})
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    home = self._homes.get((parameter, key))
                    if home is not None and (home.shape, home.dtype) != (value.shape, value.dtype):
                        home = None
                    entry[key] = self._homes[parameter, key] = self._send(value, home)
