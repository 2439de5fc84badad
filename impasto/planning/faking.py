"""A base of fake tensors: real modules whose weights have shapes and types, and take no memory.

Its configuration is all that is asked for: a file's header, a folder's config.json files, or, where there is no file at
all, what the family's authors have published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.families import FAMILIES
from impasto.families.base import Base
from impasto.families.load import locate
from impasto.formats.checkpoint import Checkpoint, open_checkpoint
from impasto.formats.configs import CONFIGS, FamilyConfig
from impasto.formats.source import Source
from impasto.formats.tensor_files import NoTensors
from impasto.formats.text_files import open_text_encoders
from impasto.training.recipe import BaseOptions


@dataclass(frozen=True)
class Imagined(Checkpoint):
    """A checkpoint whose tensors are made up, each when it is asked for: within a FakeTensorMode they are fake."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """One with the configurations of another."""
        return cls(**{each.name: getattr(checkpoint, each.name) for each in fields(checkpoint)})

    def names(self, component: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        part = CONFIGS.get(self.family).parts[component]
        return {entry.name: (entry.shape, torch.float32) for entry in part.entries(self.configs[component])}

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        return ((name, torch.empty(shape, dtype=dtype)) for name, (shape, dtype) in self.names(component).items())


def told(options: BaseOptions) -> tuple[Checkpoint, list[str]]:
    """What is known of a recipe's base without its weights, and lines on what was assumed.

    Raises `UserError` if neither its path nor its family says what it is.
    """
    if options.path is None or options.family is not None and not is_there(options.path):
        assert options.family is not None, "a recipe has one of both"
        FAMILIES.get(options.family)  # a name that is not known is an error, with the nearest one
        where = f"{options.path} is not there: " if options.path is not None else ""
        found = published(CONFIGS.get(options.family), Path(options.path or options.family))
        notes = [f"{where}planned for {options.family} as its authors have published it"]
        if "prediction_type" not in found.scheduler and "Flow" not in str(found.scheduler.get("_class_name")):
            found = found.predicting(options.prediction or "epsilon")
            if options.prediction is None:
                notes.append("the base is taken for the one that predicts the noise: base.prediction=v_prediction is "
                             "the other")
        return found.predicting(options.prediction), notes
    found = open_checkpoint(locate(options.path, download=options.download), weights=False)
    if found.family not in FAMILIES:
        raise UserError("is no base that can be trained", where=options.path, fix="supported: " + ", ".join(FAMILIES))
    if options.family is not None and found.family != options.family:
        raise UserError(f"is a checkpoint of {found.family}, not {options.family}", where=options.path,
                        fix=f"family = {found.family!r}, or leave it out")
    return found.predicting(options.prediction), []


def is_there(path: str) -> bool:
    """Whether a base lies here, a hub id in the local cache included."""
    try:
        locate(path)
    except UserError:
        return False
    return True


def published(table: FamilyConfig, path: Path) -> Checkpoint:
    """A family's checkpoint as its authors have published it, in one file that is nowhere."""
    return Checkpoint(path=path, family=table.name, layout="ldm",
                      configs={name: dict(part.config) for name, part in table.parts.items()},
                      scheduler=dict(table.scheduler),
                      sources={name: Source(NoTensors(), {}) for name in table.parts})


def build(checkpoint: Checkpoint, options: BaseOptions, dtype: torch.dtype) -> tuple[Base, list[str]]:
    """The base of a checkpoint, its weights fake, and lines on what was assumed. To be called in a FakeTensorMode."""
    sources: dict[str, Checkpoint] = dict.fromkeys(checkpoint.components, Imagined.of(checkpoint))
    notes: list[str] = []
    if options.vae is not None and is_there(options.vae):
        vae = open_checkpoint(locate(options.vae), family=checkpoint.family)
        sources["vae"] = Imagined.of(replace(vae, family=checkpoint.family))
    elif options.vae is not None:
        notes.append(f"{options.vae} is not there: planned with the base's own VAE")
    if options.text_encoders and all(map(is_there, options.text_encoders)):
        found = open_text_encoders(map(locate, options.text_encoders), checkpoint.family, checkpoint.path.parent)
        sources |= {name: Imagined.of(replace(one, family=checkpoint.family)) for name, one in found.items()}
    elif options.text_encoders:
        notes.append("a file of base.text_encoders is not there: planned with the base's own")
    with tempfile.TemporaryDirectory() as folder:
        if not checkpoint.path.exists():
            sources = {name: replace(source, tokenizers=_stand_ins(CONFIGS.get(checkpoint.family), Path(folder)))
                       for name, source in sources.items()}
        kind = FAMILIES.get(checkpoint.family)
        held = {kind.denoiser_name: options.quantize, **dict.fromkeys(kind.text_encoder_names, options.quantize_text)}
        base = kind.from_checkpoints(sources, dtype=dtype, clip_skip=options.clip_skip, options=options.options,
                                     quantised={name: how for name, how in held.items() if how != "none"})
    return base, notes


def _stand_ins(table: FamilyConfig, folder: Path) -> dict[str, Path]:
    """Tokenizers that a checkpoint would bring, knowing next to nothing: how much memory a text takes, its length in
    tokens says, and that is fixed."""
    from transformers import T5Tokenizer

    made: dict[str, Path] = {}
    for name, words in table.tokenizers.items():
        if not words.clip:
            vocabulary: Any = [(mark, 0.0) for mark in ("<pad>", "</s>", "<unk>", "▁")]
            T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(str(folder / name))
            made[name] = folder / name
    return made
