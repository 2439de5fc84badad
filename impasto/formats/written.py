"""Tensors written to a safetensors file in one go, and read back before that counts."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write them. What goes wrong is an `OSError`, as it is for any other file: the library has errors of its own."""
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file holds just these tensors, bit by bit."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys()) == tensors.keys() and all(
                _same_bits(file.get_tensor(name), tensor.detach().cpu()) for name, tensor in tensors.items())
    except SafetensorError:
        return False


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and every bit: NaN too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))
