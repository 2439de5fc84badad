"""A base without contents: real modules whose weights have shapes and types, and take no memory.

In a FakeTensorMode they are fake, so that all is computed but numbers; on the meta device, outside of one, methods put
their weights onto them as onto any, and codecs arrange these into files (with `valueless`, where they look at values).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from impasto.families import FAMILIES
from impasto.families.base import Base
from impasto.formats.checkpoint import Checkpoint
from impasto.formats.configs import CONFIGS, FamilyConfig
from impasto.planning.known import Known
from impasto.training.recipe import BaseOptions


@dataclass(frozen=True)
class Imagined(Checkpoint):
    """A checkpoint whose tensors are made up on a device, each when it is asked for."""

    device: str = "cpu"

    @classmethod
    def of(cls, checkpoint: Checkpoint, **others: Any) -> Self:
        """One with the configurations of another."""
        return cls(**{each.name: getattr(checkpoint, each.name) for each in fields(checkpoint)} | others)

    def names(self, component: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        part = CONFIGS.get(self.family).parts[component]
        return {entry.name: (entry.shape, torch.float32) for entry in part.entries(self.configs[component])}

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        return ((name, torch.empty(shape, dtype=dtype, device=self.device))
                for name, (shape, dtype) in self.names(component).items())


def build(known: Known, options: BaseOptions, dtype: torch.dtype, device: str = "cpu") -> Base:
    """The base that is known of: in a FakeTensorMode on the "cpu", else on the device "meta".

    `dtype`: of its weights, but for the VAE's. Adapters are not merged into it, which changes no shape. Raises
    `UserError` for components that are missing, or do not fit each other.
    """
    family = known.checkpoint.family
    sources: dict[str, Checkpoint] = {name: Imagined.of(source, family=family, device=device)
                                      for name, source in known.sources.items()}
    kind: type[Base] = FAMILIES.get(family)
    held = {kind.denoiser_name: options.quantize, **dict.fromkeys(kind.text_encoder_names, options.quantize_text)}
    with tempfile.TemporaryDirectory() as folder:
        if not known.is_there:
            made = _tokenizers(CONFIGS.get(family), Path(folder))
            sources = {name: replace(source, tokenizers=made) for name, source in sources.items()}
        base = kind.from_checkpoints(sources, device=device, dtype=dtype, clip_skip=options.clip_skip,
                                     options=options.options,
                                     quantised={name: how for name, how in held.items() if how != "none"})
    if options.init == "random":
        base.checkpoints = {}
    return base


def _tokenizers(table: FamilyConfig, folder: Path) -> dict[str, Path]:
    """Those that a checkpoint would bring, knowing next to nothing: how much memory a text takes, its length in tokens
    says, and that is fixed."""
    from transformers import T5Tokenizer

    made: dict[str, Path] = {}
    for name, words in table.tokenizers.items():
        if not words.clip:
            vocabulary: Any = [(mark, 0.0) for mark in ("<pad>", "</s>", "<unk>", "▁")]
            T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(str(folder / name))
            made[name] = folder / name
    return made
