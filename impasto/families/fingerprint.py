"""Fingerprints of components: one for all layouts of the same weights.

blake2b over the component's tensors by their names in diffusers' naming, so that an LDM file and a diffusers
folder of the same weights agree. Of the weights as the checkpoint holds them: fp16 and fp32 copies are different
weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from impasto.core.files import Remembered, cache_dir

if TYPE_CHECKING:
    from impasto.formats.checkpoint import Checkpoint

_CHUNK = 1 << 24


def fingerprint(checkpoint: Checkpoint, component: str) -> str:
    """blake2b-128, hex, of a checkpoint's component; read once, then remembered while its files stay as they are."""
    files = checkpoint.files(component)
    memory = Remembered(cache_dir() / "fingerprints.json")
    kind = f"{component}: " + hashlib.blake2b(repr([_stamp(file) for file in files[1:]]).encode()).hexdigest()[:16]
    known = memory.get(files[0], kind)
    if isinstance(known, str):
        return known
    found = of_tensors(checkpoint.tensors(component))
    memory.put(files[0], kind, found)
    memory.save()
    return found


def _stamp(file: Path) -> tuple[str, int, int, int]:
    info = file.stat()
    return file.name, info.st_size, info.st_mtime_ns, info.st_ino


def of_module(module: nn.Module) -> str:
    """The fingerprint of weights in memory."""
    return of_tensors(module.state_dict().items())


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of named tensors, in any order; CLIP's constant `position_ids` do not count."""
    digests = sorted((name, tuple(tensor.shape), str(tensor.dtype), _digest(tensor))
                     for name, tensor in tensors if not name.endswith("position_ids"))
    return hashlib.blake2b(repr(digests).encode(), digest_size=16).hexdigest()


def _digest(tensor: Tensor) -> str:
    """blake2b-128 of a tensor's bytes, a chunk at a time."""
    hasher = hashlib.blake2b(digest_size=16)
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in raw.split(_CHUNK):
        hasher.update(chunk.numpy().data)
    return hasher.hexdigest()
