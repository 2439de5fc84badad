"""OneTrainer's own adapter files: diffusers' names under kohya's prefixes, and dotted ones.

Written, and read as kohya's too: `lora_transformer_{path}`, `lora_unet_{path}` and `lora_te1_…`, the paths flat
(`convert_to_mixture` in modules/util/convert_lora_util.py of github.com/Nerogar/OneTrainer).

Read besides:
- `{component}.{path}.lora_down.weight` and so on, the form in memory, which its backups hold; in older ones the
  component is called by its prefix, `lora_transformer.…`;
- the names of the Open Model Initiative, which it wrote in 2025: original paths behind `unet.` or `transformer.`, with
  the queries, keys and values as `qkv.0`, `.1` and `.2`; text encoders as `clip_l.`, `clip_g.` and `t5.`
  (modules/util/convert/lora/ there, removed since);
- original paths by themselves, of a network without text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from impasto.core.errors import UserError
from impasto.formats import kohya, mmdit_layers, names, original
from impasto.formats.comfyui import OTHERS, ending_of
from impasto.formats.header import Header
from impasto.formats.kohya import PARTS, KohyaParts
from impasto.formats.parts import Held

#: what a dotted name begins with -> its component
HEADS = {**{component: component for component in names.COMPONENTS}, "clip_l": "text_encoder",
         "clip_g": "text_encoder_2", "t5": "text_encoder_3", "lora_unet": "unet", "lora_transformer": "transformer",
         "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2",
         "lora_te3": "text_encoder_3"}
#: endings that files of diffusers do not have
OWN = tuple(f".{ending}" for ending in PARTS if ending != "alpha" and not ending.startswith(("hada_", "lokr_")))
#: how original paths begin
BEGINNINGS = ("input_blocks.", "middle_block.", "output_blocks.", "label_emb.", "time_embed.", "out.",
              *(f"{beginning}." for beginning in mmdit_layers.BEGINNINGS if beginning != "context_embedder"))


class OneTrainer(KohyaParts):
    """One safetensors file of diffusers' names, flat or dotted, with kohya's parts."""

    name = "onetrainer"

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is not None and any(_is_own(key) for key in header.tensors)

    def layers(self, contents: Mapping[str, Held], where: Path) -> dict[str, Held]:
        return dict(contents)

    def parse(self, key: str, where: Path) -> tuple[str, str]:
        ending = ending_of(key)
        name = key.removesuffix(f".{ending}")
        if "." not in name and name.startswith("lora_"):
            return kohya.parsed(key, where)
        if not ending:
            raise UserError(f"key {key!r} ends in no part of an adapter", where=where)
        if (layer := _layer(name)) is None:
            raise UserError(f"key {key!r} names no layer of a component that is known", where=where)
        return layer, (PARTS | OTHERS)[ending]

    def spell(self, layer: str, family: str, where: Path) -> str:
        component, _, path = layer.partition(".")
        prefix = "lora_transformer_" if component == "transformer" else \
            kohya.prefix_of(component, family, path)
        return prefix + names.flatten(path)


def _is_own(key: str) -> bool:
    if not ending_of(key):
        return False
    head, _, rest = key.partition(".")
    inside = rest if head in HEADS else key
    return inside.startswith(BEGINNINGS) or head in HEADS and (key.endswith(OWN) or head not in names.COMPONENTS)


def _layer(name: str) -> str | None:
    """The layer that a dotted name means: in diffusers' names or, of SD 3's transformer, by an original path."""
    head, _, path = name.partition(".")
    component = HEADS.get(head, "")
    if not component:
        path = name
    if component in ("", "unet") and path in original.paths():
        return f"unet.{original.paths()[path]}"
    if component in ("", "transformer"):
        if match := re.fullmatch(r"(.+\.qkv)\.([012])", path):
            whole = mmdit_layers.original(match[1])
            return f"transformer.{mmdit_layers.parts(whole)[int(match[2])]}" if whole else None
        if path == mmdit_layers.original(path):
            return f"transformer.{path}"
    try:
        return f"{component}.{names.canonical(component, path)}" if component else None
    except UserError:
        return None
