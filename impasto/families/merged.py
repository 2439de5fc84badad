"""Adapters in a base's weights: what is then trained, drawn or compared stands on top of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from impasto.core.errors import UserError
from impasto.core.files import digest, key_of
from impasto.core.progress import SILENT, Reporter
from impasto.core.weighted import Weighted
from impasto.deltas.attach import attach, find_layer
from impasto.families.apply import notices
from impasto.families.base import Base, Merged
from impasto.formats.adapters import load_adapter


def merge_into(base: Base, adapters: Iterable[str], report: Reporter = SILENT) -> None:
    """Add adapters, each "FILE" or "FILE:strength", to the base's weights, one after the other: in fp32, each cast once
    to the weights' own precision.

    The base's files stay as they are, and so does its `origin`; its fingerprint is another one. Raises `UserError` for
    an adapter of another family or shape, for a layer that is not there, and for new tokens or hooks, which no weight
    can hold: before this adapter has changed anything.
    """
    for path, strength in map(Weighted.parse, adapters):
        adapter = load_adapter(path, family=base.family)
        if adapter.embeddings or adapter.hooks:
            raise UserError("holds more than changes of weights, which alone can be merged into a base", where=path,
                            fix="leave it out of base.adapters")
        for line in notices(base, adapter):
            report.note(f"{Path(path).name}: {line}")
        for layer, terms in adapter.deltas.items():
            device = next(find_layer(base.components, layer).parameters()).device
            for term in terms:
                term.to(device)
        with torch.no_grad():
            attach(base.components, adapter, strength).merge()
        base.merged += (Merged(Path(path).name, content(Path(path)), strength,
                               frozenset(layer.partition(".")[0] for layer in adapter.deltas)),)
        report.note(f"merged into the base: {Path(path).name}" + ("" if strength == 1 else f" at {strength:g}"))


def content(path: Path) -> str:
    """A digest of a file, or of a folder's files with their names."""
    if not path.is_dir():
        return digest(path)
    return key_of([(file.relative_to(path).as_posix(), digest(file)) for file in sorted(path.rglob("*"))
                   if file.is_file()])
