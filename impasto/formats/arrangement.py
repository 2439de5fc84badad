"""Which files an adapter becomes: one where one format holds all of it, else one for each kind of thing in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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

    auto is for each kind of thing what most programs read; any other format has to hold all of it. A hypernetwork
    beside other things is a file beside theirs, as no file holds both.
    """
    if format != "auto":
        return [Part(path, format, adapter)]
    rest = replace(adapter, hooks=())
    parts = [] if rest.empty and adapter.hooks else [Part(path, "kohya", rest)]
    for number, hook in enumerate(adapter.hooks, 1):
        tail = "" if len(adapter.hooks) == 1 else f"-{number}"
        beside = path if not parts else path.with_name(f"{path.stem}-hypernetwork{tail}.pt")
        parts.append(Part(beside, "hypernetwork", replace(adapter, deltas={}, embeddings={}, hooks=(hook,))))
    return parts


def save_arranged(adapter: Adapter, path: Path, *, format: str = "auto", dtype: torch.dtype = torch.float16,
                  metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Write all files of `adapter`, each as `save_adapter` does; their paths. Raises `UserError`."""
    parts = arranged(adapter, path, format)
    for part in parts:
        save_adapter(part.adapter, part.path, format=part.format, dtype=dtype, metadata=metadata)
    return [part.path for part in parts]
