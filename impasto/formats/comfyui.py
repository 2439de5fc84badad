"""ComfyUI's generic adapter file: the networks' original names, dotted.

`diffusion_model.{original path}` for the UNet, `text_encoders.clip_l.transformer.{path}` and `…clip_g…` for the text
encoders; after it the parts of kohya and LyCORIS, or what peft or diffusers call a LoRA's factors, as comfy/lora.py and
comfy/weight_adapter/*.py of github.com/Comfy-Org/ComfyUI have them. Written are kohya's parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.formats import names, original
from impasto.formats.adapters import FileCodec, Layers
from impasto.formats.header import Header
from impasto.formats.kohya import PARTS, decoded, encoded

#: component -> what its layers' names begin with
PREFIXES = {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer."}
#: other spellings of a LoRA's factors
OTHERS = {"lora_A.weight": "lora.down", "lora_B.weight": "lora.up", "lora.down.weight": "lora.down",
          "lora.up.weight": "lora.up", "lora_linear_layer.down.weight": "lora.down",
          "lora_linear_layer.up.weight": "lora.up"}


class ComfyUI(FileCodec):
    """One safetensors file of `diffusion_model.…` keys."""

    name = "comfyui"

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is not None and any(
            key.startswith(tuple(PREFIXES.values())) and _ending(key) for key in header.tensors)

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path) -> Layers:
        return decoded(tensors, metadata, _parse, where)

    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        return encoded(adapter, dtype, metadata, lambda layer: _name(layer, adapter.family, where), where)


def _ending(key: str) -> str:
    """What of a key names the part, "" if nothing does."""
    return next((ending for ending in (*PARTS, *OTHERS) if key.endswith(f".{ending}")), "")


def _parse(key: str, where: Path) -> tuple[str, str]:
    """A file's key as (layer path, part of it)."""
    component = next((name for name, prefix in PREFIXES.items() if key.startswith(prefix)), None)
    ending = _ending(key)
    if component is None or not ending:
        raise UserError(f"key {key!r} is not of ComfyUI's format, as others here are", where=where)
    path = key.removeprefix(PREFIXES[component]).removesuffix(f".{ending}")
    if component != "unet":
        path = names.canonical(component, path, where=where)
    elif path in original.paths():
        path = original.paths()[path]
    else:
        raise UserError(f"key {key!r} names no layer of a UNet", where=where)
    return f"{component}.{path}", (PARTS | OTHERS)[ending]


def _name(layer: str, family: str, where: Path) -> str:
    component, _, path = layer.partition(".")
    if component != "unet":
        return PREFIXES[component] + path
    known = original.originals(family or "sd1")
    if path not in known:
        raise UserError(f"{layer} is no layer of {family or 'sd1'} in its original names", where=where,
                        fix="save it as kohya")
    return PREFIXES[component] + known[path]
