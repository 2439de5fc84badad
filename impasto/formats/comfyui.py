"""ComfyUI's generic adapter file: the networks' original names, dotted.

`diffusion_model.{original path}` for the UNet or SD 3's transformer, `text_encoders.clip_l.transformer.{path}`,
`…clip_g…` and `…t5xxl…` for the text encoders; after it the parts of kohya and LyCORIS, or what peft or diffusers call
a LoRA's factors, as comfy/lora.py and comfy/weight_adapter/*.py of github.com/Comfy-Org/ComfyUI have them. Written are
kohya's parts. OneTrainer's files of that name have peft's factors, and alpha beside them.
"""

from __future__ import annotations

from pathlib import Path

from impasto.core.errors import UserError
from impasto.formats import mmdit_layers, names, original
from impasto.formats.header import Header
from impasto.formats.kohya import PARTS, KohyaParts

#: component -> what its layers' names begin with
PREFIXES = {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.", "transformer": "diffusion_model.",
            "text_encoder_3": "text_encoders.t5xxl.transformer."}
#: other spellings of a LoRA's factors
OTHERS = {"lora_A.weight": "lora.down", "lora_B.weight": "lora.up", "lora.down.weight": "lora.down",
          "lora.up.weight": "lora.up", "lora_linear_layer.down.weight": "lora.down",
          "lora_linear_layer.up.weight": "lora.up"}


class ComfyUI(KohyaParts):
    """One safetensors file of `diffusion_model.…` keys."""

    name = "comfyui"

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is not None and any(
            key.startswith(tuple(PREFIXES.values())) and ending_of(key) for key in header.tensors)

    def parse(self, key: str, where: Path) -> tuple[str, str]:
        component = next((name for name, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        ending = ending_of(key)
        if component is None or not ending:
            raise UserError(f"key {key!r} is not of ComfyUI's format, as others here are", where=where)
        path = key.removeprefix(PREFIXES[component]).removesuffix(f".{ending}")
        if component != "unet":
            path = names.canonical(component, path, where=where)
        elif path in original.paths():
            path = original.paths()[path]
        elif path == mmdit_layers.original(path):
            component = "transformer"
        else:
            raise UserError(f"key {key!r} names no layer of a UNet or of SD 3's transformer", where=where)
        return f"{component}.{path}", (PARTS | OTHERS)[ending]

    def spell(self, layer: str, family: str, where: Path) -> str:
        component, _, path = layer.partition(".")
        if component != "unet":
            return PREFIXES[component] + path
        known = original.originals(family or "sd1")
        if path not in known:
            raise UserError(f"{layer} is no layer of {family or 'sd1'} in its original names", where=where,
                            fix="save it as kohya")
        return PREFIXES[component] + known[path]


def ending_of(key: str) -> str:
    """What of a key names the part, "" if nothing does."""
    return next((ending for ending in (*PARTS, *OTHERS) if key.endswith(f".{ending}")), "")
