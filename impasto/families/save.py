"""A whole base as a diffusers folder: what full fine-tuning leaves behind."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_folder, write_json
from impasto.families.base import Base
from impasto.families.networks import config_of, kind_of
from impasto.formats.adapter_bytes import Taken, taken
from impasto.formats.configs import CONFIGS, FamilyConfig
from impasto.formats.written import holds, save_tensors


def save_folder(base: Base, path: Path, *, dtype: torch.dtype = torch.float16,
                metadata: dict[str, str] | None = None, replace: bool = False,
                changed: Collection[str] | None = None) -> None:
    """Write the base as a folder that diffusers' `from_pretrained` opens, weights in `dtype`; all of it or nothing;
    each file is read back and compared. With `replace` it takes the place of one that is there.

    `changed`: paths of all parameters that are no longer the checkpoint's. The others are then written as they are
    there, though the base was loaded in less precision; else all are written as they are in use.

    Raises `UserError` where it cannot be written.
    """
    with atomic_folder(path, replace=replace) as folder:
        _write_facts(base, folder)
        for name in base.components:
            with base.awake([name]):
                tensors = {key: tensor.detach().to("cpu", dtype).contiguous()
                           for key, tensor in _weights(base, name, changed).items() if not key.endswith("position_ids")}
            file = folder / _file_of(name)
            save_tensors(tensors, file, {"format": "pt", **(metadata or {})})
            if not holds(file, tensors):
                raise UserError(f"its {name} was written and reads back as something else", where=path,
                                fix="the disk is failing: save to another one")


def folder_sizes(base: Base, path: Path, *, dtype: torch.dtype = torch.float16,
                 metadata: dict[str, str] | None = None) -> dict[Path, Taken]:
    """What `save_folder` would write, by file; the networks may be on the meta device."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _write_facts(base, folder)
        sizes = {path / file.relative_to(folder): Taken(0, file.stat().st_size)
                 for file in sorted(folder.rglob("*")) if file.is_file()}
    for name, network in base.components.items():
        tensors = {key: torch.empty(tensor.shape, dtype=dtype, device="meta")
                   for key, tensor in network.state_dict().items() if not key.endswith("position_ids")}
        sizes[path / _file_of(name)] = taken(tensors, {"format": "pt", **(metadata or {})})
    return sizes


def _file_of(component: str) -> str:
    """Where a component's weights lie in a folder."""
    return f"{component}/{'model' if component.startswith('text') else 'diffusion_pytorch_model'}.safetensors"


def _write_facts(base: Base, folder: Path) -> None:
    """All files of a folder but the weights."""
    table: FamilyConfig = CONFIGS.get(base.family)
    index: dict[str, object] = {
        "_class_name": table.pipelines[base.variant], "_diffusers_version": "0.39.0", **table.index,
        "scheduler": ["diffusers", base.scheduler.get("_class_name", table.scheduler["_class_name"])]}
    for name, network in base.components.items():
        (folder / name).mkdir()
        write_json(folder / name / "config.json", config_of(network))
        index[name] = ["transformers" if name.startswith("text") else "diffusers", kind_of(network)]
    index |= base.save_tools(folder)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", base.scheduler or dict(table.scheduler))
    write_json(folder / "model_index.json", index)


def _weights(base: Base, name: str, changed: Collection[str] | None) -> dict[str, Tensor]:
    """A component's weights: those that are the checkpoint's from there, where they are more precise there."""
    weights = base.components[name].state_dict()
    left = {key for key, tensor in weights.items() if changed is not None and f"{name}.{key}" not in changed
            and tensor.dtype.itemsize < 4} if name in base.checkpoints else set[str]()
    if left:
        weights |= {key: tensor for key, tensor in base.stored(name) if key in left}
    return weights
