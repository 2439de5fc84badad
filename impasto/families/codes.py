"""Frozen weights in fewer bits: how their numbers are written, and read again on any device.

    int8   a byte a weight: whole numbers from -127 to 127, times a scale for each output
    fp8    a byte a weight: float8_e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433), times a scale for each output
    nf4    half a byte: one of 16 numbers, times the largest of each 64 weights (Dettmers et al. 2023, QLoRA,
           arXiv:2305.14314, section 3): 4.127 bits with what the blocks' own sizes take

Scales are rounded to the weights' own type before anything is divided by them. Whole numbers up to 127, and all of
float8_e4m3fn, are exact in bf16, fp16 and fp32, so that a weight that is read again is rounded once. Same weights, same
bits: what is let go and read from its file again is what it was.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

#: weights that share a size, and sizes that share a scale of their own (QLoRA's two block sizes)
BLOCK, BLOCKS = 64, 256

#: QLoRA, appendix E: quantiles of a standard normal, divided by the largest, of which 0 is one
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


class Code(abc.ABC):
    """One way of writing weights."""

    #: names of what `pack` gives, in its order
    parts: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def pack(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A weight (out, …) in few bits, to be read again in `dtype`."""

    @abc.abstractmethod
    def unpack(self, parts: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weight of that shape, in the `dtype` that it was packed for."""


class Int8(Code):
    parts = ("values", "scale")

    def pack(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = weight.flatten(1).float()
        scale = _scale(rows, 127, dtype)
        return (rows / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale

    def unpack(self, parts: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values, scale = parts
        return (values * scale).view(shape)


class Float8(Code):
    parts = ("values", "scale")  # values as bytes, which nothing casts by accident

    def pack(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = weight.flatten(1).float()
        scale = _scale(rows, 448, dtype)
        values = (rows / scale.float()).clamp_(-448, 448).to(torch.float8_e4m3fn)  # beyond there are only NaN
        return values.view(torch.uint8), scale

    def unpack(self, parts: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values, scale = parts
        return values.view(torch.float8_e4m3fn).to(dtype).mul_(scale).view(shape)


class NormalFloat4(Code):
    """Two weights a byte, the first in the upper half, as in bitsandbytes; a block's size as a byte too: so many steps
    above or below the mean of all, the steps of BLOCKS blocks being alike ("double quantization")."""

    parts = ("values", "sizes", "steps", "mean", "pairs")

    def pack(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        flat = weight.flatten().float()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        size = blocks.abs().amax(1)
        numbers = torch.tensor(NF4).to(weight.device)  # so that a fake weight has fake ones beside it
        codes = torch.bucketize(blocks / _whole(size)[:, None], (numbers[1:] + numbers[:-1]) / 2, out_int32=True)
        halves = codes.to(torch.uint8).view(-1, 2)
        mean = size.mean()
        apart = torch.nn.functional.pad(size - mean, (0, -len(size) % BLOCKS)).view(-1, BLOCKS)
        steps = apart.abs().amax(1) / 127
        sizes = (apart / _whole(steps)[:, None]).round_().to(torch.int8).flatten()[:len(size)]
        pairs = torch.stack([numbers.repeat_interleave(16), numbers.repeat(16)], 1).to(dtype)
        return halves[:, 0] * 16 + halves[:, 1], sizes, steps, mean, pairs

    def unpack(self, parts: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values, sizes, steps, mean, pairs = parts
        size = (sizes * steps.repeat_interleave(BLOCKS)[:len(sizes)]).add_(mean).clamp_(min=0)
        blocks = torch.nn.functional.embedding(values.int(), pairs).view(-1, BLOCK).mul_(size.to(dtype)[:, None])
        return blocks.flatten()[:math.prod(shape)].view(shape)


CODES: dict[str, Code] = {"int8": Int8(), "fp8": Float8(), "nf4": NormalFloat4()}


def _scale(rows: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """What each of `rows` (out, n) is divided by, (out, 1), so that the largest becomes `most`."""
    return _whole((rows.abs().amax(1, keepdim=True) / most).to(dtype))


def _whole(scale: Tensor) -> Tensor:
    """Scales, 1 in the place of 0: of what is all zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
