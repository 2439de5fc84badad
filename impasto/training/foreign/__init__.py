"""Settings of other trainers as recipes. A new trainer is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from impasto.core.errors import UserError
from impasto.core.registry import Registry

if TYPE_CHECKING:
    from impasto.training.foreign.engine import Imported

SOURCES = Registry("trainer", {
    "kohya": "impasto.training.foreign.kohya_files:Kohya",
    "onetrainer": "impasto.training.foreign.onetrainer_files:OneTrainer",
})


def import_recipe(paths: Sequence[Path]) -> Imported:
    """The recipe in one trainer's files, with an account of every key. Raises `UserError` for files of no trainer's."""
    from impasto.training.foreign.document import read_document

    documents = [read_document(path) for path in paths]
    for document in documents:
        if isinstance(document.data, dict) and {"base", "method"} <= document.data.keys():
            raise UserError("is a recipe of Impasto's already", where=document.path, fix="impasto train takes it")
        if isinstance(document.data, dict) and "LoRA_type" in document.data:
            raise UserError("is a setting of kohya's GUI, not of his scripts", where=document.path,
                            fix="press Print training command, and put what it prints into a text file")
    sources = [SOURCES.get(name)() for name in SOURCES]
    for document in documents:
        if not any(source.claims(document) for source in sources):
            raise UserError(f"is none of what can be read: settings of {', '.join(s.title for s in sources)}",
                            where=document.path)
    for source in sources:
        if all(source.claims(document) for document in documents):
            return source.translate(documents)
    raise UserError("belong to different trainers", where=" and ".join(map(str, paths)), fix="import one at a time")
