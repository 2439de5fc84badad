"""What waits in the computer's memory while the device is busy with other things: activations, optimizer states, and
frozen blocks.

On a device without memory of its own all of it stays where it is, and goes the same ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

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
    a tensor by itself). `send` and `bring` are the ways there and back; what stays is given to `keep`.
    """

    def __init__(self, weights: Callable[[], Iterable[Tensor]], *, send: Callable[[Tensor], Tensor] = to_host,
                 bring: Callable[[Tensor, torch.device], Tensor] = to_device, least: int = LEAST,
                 keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self._weights, self._send, self._bring, self._least, self._keep = weights, send, bring, least, keep

    @contextmanager
    def away(self) -> Iterator[None]:
        """A block with a forward, whose backward may come after it."""
        stay = {_storage(tensor) for tensor in self._weights()}
        last: list[tuple[Tensor, _Away]] = []  # kept alive, so that nothing else can lie where it does

        def pack(tensor: Tensor) -> Tensor | _Away:
            if tensor.nbytes < self._least or _storage(tensor) in stay:
                return self._keep(tensor)
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


# --- blocks ------------------------------------------------------------------------------------------------


class Blocks:
    """Frozen weights of blocks wait elsewhere, and are on the device for the length of each of the block's forwards.

    A backward needs them too. Where it computes the block again, its graph holds what was brought for that, until it is
    done with the block: another tensor than the one that waits, so that neither knows of the other. `ahead`, as it is
    on CUDA: the next block in turn is on its way while one computes. Turns are as given, until the first forward has
    shown them: a UNet's modules are not in the order in which it computes.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, *, send: Callable[[Tensor], Tensor] = to_host,
                 bring: Callable[[Tensor, torch.device], Tensor] = to_device, ahead: bool | None = None) -> None:
        self._device, self._bring, blocks = device, bring, list(blocks)
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._places = [_frozen(block) for block in blocks]
        self._waiting = [[send(held[name].detach()) for held, name in places] for places in self._places]
        self._coming: dict[int, list[Tensor]] = {}
        self._turns, self._met = list(range(len(blocks))), list[int]()
        self._last: int | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for i, block in enumerate(blocks):
            self._put(i, self._waiting[i])
            block.register_forward_pre_hook(functools.partial(self._before, i))
            # always: a block that is computed again stops in the midst, once all is there that was kept of it
            block.register_forward_hook(functools.partial(self._after, i), always_call=True)

    def _before(self, i: int, module: nn.Module, args: Any) -> None:
        self._come(i)

    def _after(self, i: int, module: nn.Module, args: Any, out: Any) -> None:
        self._put(i, self._waiting[i])

    def _put(self, i: int, tensors: list[Tensor]) -> None:
        for (held, name), tensor in zip(self._places[i], tensors, strict=True):
            held[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(held[name], nn.Parameter) else tensor

    def _brought(self, i: int) -> list[Tensor]:
        return [self._bring(tensor, self._device) for tensor in self._waiting[i]]

    def _come(self, i: int) -> None:
        coming = self._coming.pop(i, None)
        self._coming.clear()
        if coming is not None and self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            for tensor in coming:
                tensor.record_stream(now)  # or its memory might be given away while this stream reads it
        self._put(i, coming or self._brought(i))
        after = self._after_this(i)
        if self._ahead and after is not None:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._coming[after] = self._brought(after)

    def _after_this(self, i: int) -> int | None:
        """The block that comes after this one: the backward goes through them the other way."""
        if i in self._met and len(self._met) == len(self._turns):
            self._turns = self._met
        elif i not in self._met:
            self._met.append(i)
        turn, last = self._turns.index(i), -1 if self._last is None else self._turns.index(self._last)
        self._last = i
        after = turn + (1 if turn > last else -1)
        return self._turns[after] if 0 <= after < len(self._turns) else None


def _frozen(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where in a block there is something that does not train."""
    found: list[tuple[dict[str, Any], str]] = []
    for module in block.modules():
        for held in (module._parameters, module._buffers):
            found += [(held, name) for name, tensor in held.items() if tensor is not None and not tensor.requires_grad]
    return found
