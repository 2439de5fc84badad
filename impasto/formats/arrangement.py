"""Which files an adapter becomes: one where one format holds all of it, else one for each kind of thing in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from impasto.deltas.adapter import Adapter
from impasto.formats.adapters import save_adapter


@dataclass(frozen=True)
class Part:
    """One file to be."""

    path: Path
    format: str
    adapter: Adapter


def arranged(adapter: Adapter, path: Path, format: str = "auto") -> list[Part]:
    """The files that hold `adapter`; the first is `path`, others are called after it.

    auto is for each kind of thing what most programs read; any other format has to hold all of it.
    """
    return [Part(path, "kohya" if format == "auto" else format, adapter)]


def save_arranged(adapter: Adapter, path: Path, *, format: str = "auto", dtype: torch.dtype = torch.float16,
                  metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Write all files of `adapter`, each as `save_adapter` does; their paths. Raises `UserError`."""
    parts = arranged(adapter, path, format)
    for part in parts:
        save_adapter(part.adapter, part.path, format=part.format, dtype=dtype, metadata=metadata)
    return [part.path for part in parts]
