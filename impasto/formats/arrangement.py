"""Which files an adapter becomes: one where one format holds all of it, else one for each kind of thing in it."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from impasto.deltas.adapter import Adapter
from impasto.formats.adapter_bytes import Taken
from impasto.formats.adapters import adapter_sizes, save_adapter

#: formats whose files hold one token
SINGLE = ("webui-embedding", "diffusers-embedding")


@dataclass(frozen=True)
class Part:
    """One file to be."""

    path: Path
    format: str
    adapter: Adapter


def arranged(adapter: Adapter, path: Path, format: str = "auto") -> list[Part]:
    """The files that hold `adapter`; the first is `path`, others are called after it.

    auto is for each kind of thing what most programs read; any other format has to hold all of it. Tokens beside
    deltas lie in the deltas' file, where A1111 finds them; one token alone is an embedding's file; several alone are
    bundled at `path`, and each has a file of its own beside it, since diffusers and ComfyUI read one at a time. A
    hypernetwork beside other things is a file beside theirs, as no file holds both. Where a format of one token is
    asked for, several tokens are in files of it beside `path`, where they are bundled.
    """
    single = "webui-embedding" if format == "auto" else format
    several = len(adapter.embeddings) > 1 and not (adapter.deltas or adapter.hooks)
    if format != "auto" and not (single in SINGLE and several):
        return [Part(path, format, adapter)]
    rest = replace(adapter, hooks=())
    parts = [] if rest.empty and adapter.hooks else _without_hooks(rest, path, single)
    for number, hook in enumerate(adapter.hooks, 1):
        tail = "" if len(adapter.hooks) == 1 else f"-{number}"
        beside = path if not parts else path.with_name(f"{path.stem}-hypernetwork{tail}.pt")
        parts.append(Part(beside, "hypernetwork", replace(adapter, deltas={}, embeddings={}, hooks=(hook,))))
    return parts


def _without_hooks(adapter: Adapter, path: Path, single: str) -> list[Part]:
    """The files of deltas and tokens; `single`: the format of a token by itself."""
    if adapter.deltas or not adapter.embeddings:
        return [Part(path, "kohya", adapter)]
    if len(adapter.embeddings) == 1:
        return [Part(path, single, adapter)]
    parts, taken = [Part(path, "kohya", adapter)], set[str]()
    for token, vectors in adapter.embeddings.items():
        own = path.with_name(f"{path.stem}-{_file_name(token, taken)}.safetensors")
        parts.append(Part(own, single, replace(adapter, embeddings={token: vectors})))
    return parts


def _file_name(token: str, taken: set[str]) -> str:
    """A token's name without what file systems do not take, and unlike any in `taken`, letters' case apart."""
    plain = re.sub(r"[^\w-]+", "_", token).strip("_") or "token"
    names = (plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3)))
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return name


def save_arranged(adapter: Adapter, path: Path, *, format: str = "auto", dtype: torch.dtype = torch.float16,
                  metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Write all files of `adapter`, each as `save_adapter` does; their paths. Raises `UserError`, and leaves none."""
    parts = arranged(adapter, path, format)
    if len(parts) == 1:
        save_adapter(adapter, path, format=parts[0].format, dtype=dtype, metadata=metadata)
        return [path]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder:
        written = [Path(folder) / part.path.name for part in parts]
        for part, file in zip(parts, written, strict=True):
            save_adapter(part.adapter, file, format=part.format, dtype=dtype, metadata=metadata)
        for part, file in zip(parts, written, strict=True):
            os.replace(file, part.path)
    return [part.path for part in parts]


def arranged_sizes(adapter: Adapter, path: Path, *, format: str = "auto", dtype: torch.dtype = torch.float16,
                   metadata: Mapping[str, str] | None = None) -> dict[Path, Taken]:
    """What `save_arranged` would write, by file. Raises `UserError` as it does."""
    sizes: dict[Path, Taken] = {}
    for part in arranged(adapter, path, format):
        sizes |= adapter_sizes(part.adapter, part.path, format=part.format, dtype=dtype, metadata=metadata)
    return sizes
