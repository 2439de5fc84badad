"""A ledger of storages: what lives, for what, and the most there ever was at once.

It watches each operation that is dispatched, real or on fake tensors, and enters each new storage; a finalizer strikes
it out when the last tensor on it is gone. Nothing is asked of the program that runs under it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

#: what nothing else is known of
UNKNOWN = "temporaries"


@dataclass
class Block:
    """One storage."""

    number: int
    size: int  # bytes, as they are counted
    label: str
    weights: bool = False  # whether it holds a network's or an adapter's weights
    counted: bool = True  # False while it lies elsewhere


@dataclass
class Peak:
    """The most that there was at once."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    moment: str = ""


class Ledger(TorchDispatchMode):
    """Enters every storage that comes into being within it. Modes that make tensors fake go around it.

    `round_to`: what an allocator rounds sizes up to, bytes. `scratch` says, of an operation and its arguments, how many
    bytes it takes while it runs and gives back. `events` is every coming (number, bytes) and going (number, 0), for an
    allocator to be replayed on.
    """

    def __init__(self, round_to: int = 1, scratch: Any = None) -> None:
        super().__init__()
        self.round_to, self.scratch = round_to, scratch
        self.blocks: dict[int, Block] = {}  # by the storage's address
        self.totals: Counter[str] = Counter()
        self.now = 0
        self.moment = ""
        self.peak = Peak()
        self.peaks: dict[str, Peak] = {}  # by moment
        self.events: list[tuple[int, int]] = []
        self.flops: Counter[str] = Counter()
        self.traffic = 0
        self._numbers = 0
        self._copied: Block | None = None  # while a copy of it is made
        self._here = True  # whether what comes into being lies here

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and saying so at each operation takes time

    # --- what comes and goes -------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # what most calls ask for, at a tenth of the cost
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.5 if args[0].dtype.is_floating_point else 1  # a number as good as any, and a yes
        out = func(*args, **kwargs)
        given = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        moved = 0
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                if tensor.untyped_storage()._cdata not in self.blocks:
                    self.enter(tensor, self._label_of(func, given))
                    moved += tensor.untyped_storage().nbytes()
                elif func._schema.is_mutable:
                    moved += tensor.numel() * tensor.element_size()
        if moved:  # a view moves nothing
            self.traffic += moved + sum(tensor.numel() * tensor.element_size() for tensor in given)
        self._count(func, args, kwargs, out)
        if self.scratch is not None and (extra := self.scratch(func, args)):
            self._come(extra)
        return out

    def enter(self, tensor: Tensor, label: str, weights: bool = False) -> None:
        """Note a tensor's storage under a label, whether it is known already or not."""
        storage = tensor.untyped_storage()
        if (block := self.blocks.get(storage._cdata)) is not None:
            block.weights |= weights
            self._relabel(block, label)
            return
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        self._numbers += 1
        block = self.blocks[storage._cdata] = Block(self._numbers, size, label, weights, self._here)
        weakref.finalize(storage, self._gone, storage._cdata).atexit = False
        if block.counted:
            self._add(block)

    def known(self, tensor: Tensor) -> Block | None:
        """What is noted of a tensor's storage."""
        return self.blocks.get(tensor.untyped_storage()._cdata)

    def move(self, tensors: Iterable[Tensor], here: bool) -> None:
        """Storages leave for another device, or come back."""
        for tensor in tensors:
            block = self.known(tensor)
            if block is not None and block.counted != here:
                if here:
                    self._add(block)
                else:
                    self._remove(block)
                block.counted = here

    def send(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A copy elsewhere, or the tensor itself where it lies there (`training.offload.to_host`, of a GPU)."""
        block = self.known(tensor)
        if block is None or not block.counted:
            return tensor
        return self._copy(tensor, block, here=False) if into is None else into.copy_(tensor)

    def bring(self, tensor: Tensor, device: Any = None) -> Tensor:
        """A copy of what lies elsewhere, or the tensor itself where it is here (`training.offload.to_device`)."""
        block = self.known(tensor)
        return tensor if block is None or block.counted else self._copy(tensor, block, here=True)

    def _copy(self, tensor: Tensor, block: Block, here: bool) -> Tensor:
        """What it is for, a copy inherits."""
        self._copied, self._here = block, here
        try:
            copy = tensor.clone()
        finally:
            self._copied, self._here = None, True
        self.enter(copy, block.label, block.weights)
        return copy

    def _gone(self, address: int) -> None:
        block = self.blocks.pop(address)
        if block.counted:
            self._remove(block)

    def _add(self, block: Block) -> None:
        self.totals[block.label] += block.size
        self.now += block.size
        self.events.append((block.number, block.size))
        if self.now >= self.peak.total:
            self.peak = Peak(self.now, dict(self.totals), self.moment)
        best = self.peaks.get(self.moment)
        if best is None or self.now >= best.total:
            self.peaks[self.moment] = Peak(self.now, dict(self.totals), self.moment)

    def _remove(self, block: Block) -> None:
        self.totals[block.label] -= block.size
        self.now -= block.size
        self.events.append((block.number, 0))

    def _come(self, size: int) -> None:
        """What comes and goes within one operation."""
        self._numbers += 1
        block = Block(self._numbers, -(-size // self.round_to) * self.round_to, UNKNOWN)
        self._add(block)
        self._remove(block)

    # --- what it is for ------------------------------------------------------------------------------------
    def _label_of(self, func: Any, given: list[Tensor]) -> str:
        """A copy of a weight in another type is autocast's; all else shows later what it is for."""
        if self._copied is not None:
            return self._copied.label
        if func is aten._to_copy.default and (source := self.known(given[0])) is not None and source.weights:
            return "autocast"
        return UNKNOWN

    def _relabel(self, block: Block, label: str) -> None:
        if block.counted:
            self.totals[block.label] -= block.size
            self.totals[label] += block.size
        block.label = label

    def claim(self, tensor: Tensor, label: str) -> None:
        """Label what has no better one yet."""
        block = self.known(tensor)
        if block is not None and block.label in (UNKNOWN, "activations"):
            self._relabel(block, label)

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd keeps a tensor for the backward (`saved_tensors_hooks`)."""
        block = self.known(tensor)
        if block is not None and block.label == UNKNOWN:
            self._relabel(block, "activations")
        return tensor

    def gradients_of(self, parameters: Iterable[nn.Parameter]) -> None:
        """From now on, gradients of these are noted as such."""
        def accumulated(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.claim(parameter.grad, "gradients")

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(accumulated)

    @contextmanager
    def at(self, moment: str) -> Iterator[None]:
        """A moment of the run, for the length of the block."""
        before, self.moment = self.moment, moment
        try:
            yield
        finally:
            self.moment = before

    # --- work ----------------------------------------------------------------------------------------------
    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        formula = FLOPS.get(func._overloadpacket)
        if formula is None:
            return
        again = self.moment == "backward" and (torch.is_grad_enabled() or func._overloadpacket in FORWARD)
        self.flops["recomputed" if again else self.moment] += formula(*args, **kwargs, out_val=out)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Two products, of queries and keys, and of what comes of it and values."""
    (b, h, s, d), t, e = query.shape, key.shape[2], value.shape[3]
    return 2 * b * h * s * t * (d + e)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None,
                        **__: Any) -> int:
    """Five: the scores again, and the gradients of scores, values, queries and keys."""
    (b, h, s, d), t, e = query.shape, key.shape[2], value.shape[3]
    return 2 * b * h * s * t * (3 * d + 2 * e)


#: what no backward has of its own: there it is the forward once more
FORWARD = {aten.convolution, aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
           aten._scaled_dot_product_flash_attention_for_cpu}
#: multiply-adds, counted as two, of the operations that have most of them; torch does not count a CPU's attention
FLOPS = dict(flop_registry) | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
