"""A checkpoint in the other layout: a single file (LDM), or a folder as diffusers has it. As a stream, bit for bit."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from impasto.core.errors import UserError
from impasto.core.files import atomic_folder, atomic_write, require_space, write_json
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.diffusion.process import DDPM
from impasto.families.tokenizer import clip_table, clip_tokenizer, table_of, write_tokenizer
from impasto.formats.checkpoint import WORDS, Checkpoint
from impasto.formats.configs import CONFIGS, FamilyConfig, Words
from impasto.formats.entries import Entry
from impasto.formats.header import dtype_name, header_bytes
from impasto.formats.rewrite import cast, kept, lockstep, raw, together
from impasto.toolbox.places import check_output


@dataclass(frozen=True)
class Row:
    """One tensor of the file to be: its key and shape there, its type, and what it is made of.

    That is one tensor of a component, or several one below the other, each with the way in which it lies there
    (`Entry`); or, where there are none, a number.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    component: str
    parts: tuple[tuple[str, str], ...]
    value: float = 0.0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def to_folder(checkpoint: Checkpoint, out: Path, *, dtype: torch.dtype | None = None, force: bool = False,
              report: Reporter = SILENT) -> None:
    """Write a checkpoint as a folder that diffusers' `from_pretrained` opens. Raises `UserError`: also for one without
    all of its networks."""
    check_output(out, [checkpoint.path], force=force, ending="")
    table = _table(checkpoint)
    if lacking := [name for name in table.parts if name not in (*checkpoint.components, *table.optional)]:
        raise UserError(f"holds no {' and no '.join(lacking)}, and a folder wants all networks", where=checkpoint.path,
                        fix="convert the whole checkpoint")
    checkpoint.check_prediction()
    for name, words in table.tokenizers.items():
        if words.component in checkpoint.components and not words.clip and name not in checkpoint.tokenizers:
            raise UserError(f"has no {name}, the tokenizer of its {words.component}", where=checkpoint.path,
                            fix=f"put the folder {name} of a diffusers folder of this model beside it")
    rows = {name: [Row(key, shape, kept(own, dtype), name, ((key, ""),)) for key, (shape, own) in
                   checkpoint.names(name).items()] for name in checkpoint.components}
    total = sum(row.bytes for own in rows.values() for row in own)
    require_space(out, total, "the folder")
    index: dict[str, Any] = {
        "_class_name": table.pipelines[checkpoint.variant], "_diffusers_version": "0.39.0", **table.index}
    with report.phase("writing", total, "bytes") as advance, atomic_folder(out, replace=force) as folder:
        for name in checkpoint.components:
            text = name.startswith("text")
            (folder / name).mkdir()
            kind = table.parts[name].classes[0]
            model = "t5" if kind.startswith("T5") else "clip_text_model"
            told = {"architectures": [kind], "model_type": model} if text else {"_class_name": kind}
            write_json(folder / name / "config.json", checkpoint.configs[name] | told)
            with open(folder / name / f"{'model' if text else 'diffusion_pytorch_model'}.safetensors", "wb") as file:
                _write(file, checkpoint, rows[name], {"format": "pt"}, advance, out)
            index[name] = ["transformers" if text else "diffusers", kind]
        for name, words in table.tokenizers.items():
            if words.component in checkpoint.components:
                _tokenizer(checkpoint, name, words, folder / name)
                index[name] = ["transformers", words.classes[0]]
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
        index["scheduler"] = ["diffusers", checkpoint.scheduler.get("_class_name", table.scheduler["_class_name"])]
        write_json(folder / "model_index.json", index)


def to_file(checkpoint: Checkpoint, out: Path, *, dtype: torch.dtype | None = None, force: bool = False,
            report: Reporter = SILENT) -> None:
    """Write a checkpoint as one file in the original names, which A1111, ComfyUI and kohya open.

    What its shapes do not tell and the family's published configuration has otherwise is in its metadata,
    `impasto.config`; v-prediction and zero terminal SNR are the empty tensors that those programs look for. T5's
    tokenizer stays where it is. Raises `UserError` for what such a file has no place for: a tokenizer of CLIP with
    other words, another shift of a flow, a projection that the family's single files lack.
    """
    check_output(out, [checkpoint.path], force=force, ending=".safetensors")
    table = _table(checkpoint)
    _check_tokenizer(checkpoint, table)
    _check_told(checkpoint, table)
    for name in checkpoint.tokenizers:
        if not table.tokenizers[name].clip:
            report.note(f"a single file has no place for its {name}: to use it here, put that folder beside the file")
    metadata = {"format": "pt", **_untold(checkpoint, table)}
    told = checkpoint.scheduler.get("prediction_type")
    if told in WORDS and told != table.scheduler.get("prediction_type"):
        metadata["modelspec.prediction_type"] = WORDS[told]
    rows = [row for name in checkpoint.components for row in _original(checkpoint, table, name, dtype)]
    marks = _marks(checkpoint)
    require_space(out, sum(row.bytes for row in rows), "the file")
    with report.phase("writing", sum(row.bytes for row in rows), "bytes") as advance, atomic_write(out) as file:
        _write(file, checkpoint, rows, metadata, advance, out, marks)


def _original(checkpoint: Checkpoint, table: FamilyConfig, name: str, dtype: torch.dtype | None) -> Iterator[Row]:
    """A component's tensors as a single file has them, and what belongs there besides."""
    part, own, config = table.parts[name], checkpoint.names(name), checkpoint.configs[name]
    held: dict[str, list[Entry]] = {}
    for entry in part.entries(config):
        if entry.how != "identity":
            held.setdefault(entry.ldm, []).append(entry)
    made: dict[str, Row] = {}
    for key, entries in held.items():
        wide = functools.reduce(torch.promote_types, (own[entry.name][1] for entry in entries))
        made[key] = Row(part.prefix + key, entries[0].ldm_shape, kept(wide, dtype), name,
                        tuple((entry.name, entry.how) for entry in sorted(entries, key=lambda e: e.piece)))
    yield from made.values()
    usual = next(iter(made.values())).dtype
    for extra in part.extras(config):
        like = made.get(extra.like)
        yield Row(part.prefix + extra.ldm, extra.shape, like.dtype if like else usual, name, like.parts if like else (),
                  extra.value)


def _write(file: IO[bytes], checkpoint: Checkpoint, rows: list[Row], metadata: dict[str, str], advance: Advance,
           out: Path, marks: tuple[str, ...] = ()) -> None:
    """Header, then the tensors, each read when its turn has come: the components' side by side."""
    layout = {row.key: (dtype_name(row.dtype), row.shape) for row in rows}
    head, order = header_bytes(layout | {mark: ("F32", (0,)) for mark in marks}, metadata)
    by_key = {row.key: row for row in rows}
    ordered = [by_key[key] for key in order if key in by_key]
    streams = {component: lockstep(checkpoint, component, [part for row in ordered if row.component == component
                                                           for part, _ in row.parts])
               for component in {row.component for row in rows}}
    file.write(head)
    for row in ordered:
        parts = [(next(streams[row.component])[1], how) for _, how in row.parts]
        tensor = together(parts) if parts else torch.full(row.shape, row.value)
        file.write(raw(cast(row.key, tensor, tensor, row.dtype, out)))
        advance(row.bytes)


def _table(checkpoint: Checkpoint) -> FamilyConfig:
    if not checkpoint.family:
        raise UserError("is a VAE alone, which does not tell its family", where=checkpoint.path,
                        fix="give a whole checkpoint")
    return CONFIGS.get(checkpoint.family)


def _untold(checkpoint: Checkpoint, table: FamilyConfig) -> dict[str, str]:
    """Metadata of what a single file's shapes do not tell, where it differs from the published. `UserError` for a
    setting that is none of a single number or word."""
    found = {}
    for name in checkpoint.components:
        part, own = table.parts[name], checkpoint.configs[name]
        if other := {key: own[key] for key in part.untold if key in own and own[key] != part.config[key]}:
            if strange := [key for key, value in other.items() if type(value) is not type(part.config[key])]:
                raise UserError(f"its {name} has {strange[0]} = {other[strange[0]]}, which a single file cannot tell",
                                where=checkpoint.path, fix="keep it as a folder")
            found[name] = other
    return {"impasto.config": json.dumps(found, sort_keys=True)} if found else {}


def _marks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Empty tensors by which other programs know another noise process."""
    told = checkpoint.scheduler
    return (*(("v_pred",) if told.get("prediction_type") == "v_prediction" else ()),
            *(("ztsnr",) if told.get("rescale_betas_zero_snr") else ()))


def noise_left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A line about a noise process of steps other than the family's, which is what a single file stands for."""
    usual = _table(checkpoint).scheduler
    if "shift" in usual:  # see `_check_told`
        return ()
    own, family = (DDPM.from_scheduler_config({**config, "rescale_betas_zero_snr": False})
                   for config in (checkpoint.scheduler, usual))
    if len(own.betas) == len(family.betas) and np.allclose(own.betas, family.betas, rtol=1e-6):
        return ()
    keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    changed = [f"{key} {getattr(own, key)}, not {getattr(family, key)}" for key in keys
               if getattr(own, key) != getattr(family, key)]
    told = "trained_betas of its own" if own.trained_betas is not None else "; ".join(changed)
    return (f"left out, as a single file stands for the family's noise process: {told}",)


def _check_told(checkpoint: Checkpoint, table: FamilyConfig) -> None:
    """Raise a `UserError` for what readers of single files take for granted, where it is otherwise here."""
    shift, own = table.scheduler.get("shift"), checkpoint.scheduler.get("shift", 1.0)
    if shift is not None and own != shift:
        raise UserError(f"has a shift of {own}, and a single file stands for {shift}", where=checkpoint.path,
                        fix="keep it as a folder")
    if (kind := checkpoint.scheduler.get("prediction_type")) is not None and shift is None and kind not in WORDS:
        raise UserError(f"predicts the {kind}, which a single file cannot tell", where=checkpoint.path,
                        fix="keep it as a folder")
    for name in checkpoint.components:
        for entry in table.parts[name].entries(checkpoint.configs[name]):
            if entry.how == "identity":
                tensor = checkpoint.tensor(name, entry.name).float()
                if not torch.equal(tensor, torch.eye(len(tensor))):
                    raise UserError(f"has a {name}.{entry.name} of its own, for which a single file has no place",
                                    where=checkpoint.path, fix="keep it as a folder")


def _check_tokenizer(checkpoint: Checkpoint, table: FamilyConfig) -> None:
    """Raise a `UserError` for a tokenizer of its own, whose words a single file's readers would not know."""
    for folder in (folder for name, folder in checkpoint.tokenizers.items() if table.tokenizers[name].clip):
        own = {token for token in table_of(clip_tokenizer(folder))[0]}
        if own != clip_table()[0].keys() or (folder / "added_tokens.json").exists():
            raise UserError("has a tokenizer of its own, for which a single file has no place", where=folder,
                            fix="keep it as a folder")


def _tokenizer(checkpoint: Checkpoint, name: str, words: Words, folder: Path) -> None:
    """The checkpoint's own, or CLIP's as the family has it."""
    if name in checkpoint.tokenizers:
        shutil.copytree(checkpoint.tokenizers[name], folder)
    else:
        folder.mkdir()
        write_tokenizer(folder, pad=words.pad)
