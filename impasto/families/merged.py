"""Adapters in a base's weights: what is then trained, drawn or compared stands on top of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from impasto.core.errors import UserError
from impasto.core.files import digest, key_of
from impasto.core.progress import SILENT, Reporter
from impasto.core.weighted import Weighted
from impasto.deltas.attach import attach, beside_layers
from impasto.families.apply import naming, notices
from impasto.families.base import Base
from impasto.families.weights import Merged
from impasto.formats.adapters import load_adapter


def merge_into(base: Base, adapters: Iterable[str], report: Reporter = SILENT) -> None:
    """Add adapters, each "FILE" or "FILE:strength", to the base's weights, one after the other: in fp32, each cast once
    to the weights' own precision.

    The base's files stay as they are, and so does its `origin`; its fingerprint is another one. Raises `UserError` for
    an adapter of another family or shape, for a layer that is not there, and for new tokens or hooks, which no weight
    can hold: before this adapter has changed anything, naming its file.
    """
    for path, strength in map(Weighted.parse, adapters):
        adapter = load_adapter(path, family=base.family)
        if adapter.embeddings or adapter.hooks:
            raise UserError("holds more than changes of weights, which alone can be merged into a base", where=path,
                            fix="leave it out of base.adapters")
        with naming(path):
            told = notices(base, adapter)
            attach(base.components, beside_layers(base.components, adapter.deltas), strength).merge()
        for line in told:
            report.note(f"{Path(path).name}: {line}")
        base.merged += (Merged(Path(path).name, content(Path(path)), strength,
                               frozenset(layer.partition(".")[0] for layer in adapter.deltas), adapter.deltas),)
        report.note(f"merged into the base: {Path(path).name}" + ("" if strength == 1 else f" at {strength:g}"))


def content(path: Path) -> str:
    """A digest of a file, or of a folder's files with their names."""
    if not path.is_dir():
        return digest(path)
    return key_of([(file.relative_to(path).as_posix(), digest(file)) for file in sorted(path.rglob("*"))
                   if file.is_file()])
