"""Which layers of a LoRA file each program of the field would load, and which it would pass over in silence.

Told from the names of the keys, by each program's own map of names, for SD 1.x. A program that does not know a
key skips it; a file "works" then without effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import load_adapter
from impasto.formats.header import read_header

# pieces of the patterns, in diffusers' names; in kohya's, `.` is `_`
_BLOCKS = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_ATTENTION = _BLOCKS + r"\.attentions\.\d+"
_TRANSFORMER = _ATTENTION + r"\.transformer_blocks\.\d+"
_ATTN = _TRANSFORMER + r"\.attn[12]\.to_(?:q|k|v|out\.0)"
_REST = "|".join((
    _TRANSFORMER + r"\.ff\.net\.(?:0\.proj|2)",
    _ATTENTION + r"\.proj_(?:in|out)",
    _BLOCKS + r"\.resnets\.\d+\.(?:conv[12]|time_emb_proj|conv_shortcut)",
    r"(?:down_blocks\.\d+\.downsamplers|up_blocks\.\d+\.upsamplers)\.0\.conv",
))
_ENDS = r"conv_in|conv_out|time_embedding\.linear_[12]"
_TEXT = r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
_KOHYA = r"\.(?:lora_up\.weight|lora_down\.weight|alpha)"
_PEFT = r"\.lora_[AB]\.weight"
_BUNDLE = r"bundle_emb\.[^.]+\.(?:string_to_param\..+|clip_[lg]|emb_params)"  # new tokens beside the layers
_OLD = r"\.(?:lora|lora_linear_layer)\.(?:up|down)\.weight"
_OLD_ATTN = _TRANSFORMER + r"\.attn[12]\.processor\.to_(?:q|k|v|out)_lora\.(?:up|down)\.weight"


def _kohya(unet: str) -> str:
    """A pattern for kohya's keys: the text encoder's, and those of the UNet's layers that a pattern names."""
    flat = [pattern.replace(r"\.", "_") for pattern in (unet, _TEXT)]
    return rf"(?:lora_unet_(?:{flat[0]})|lora_te_(?:{flat[1]})){_KOHYA}"


@dataclass(frozen=True)
class Program:
    """`loads`: a key is loaded if one of these patterns matches all of it. `source`: where that is seen."""

    name: str
    loads: tuple[str, ...]
    source: str


# in ComfyUI's map dotted names have `.processor.` before `to_q` and no `.0` after `to_out`, so attention in peft's
# spelling is not among them
_COMFY = (_kohya(f"{_ATTN}|{_REST}|{_ENDS}"), rf"(?:unet\.)?(?:{_REST}|{_ENDS})(?:{_PEFT}|{_OLD})",
          rf"(?:unet\.)?{_OLD_ATTN}", rf"text_encoder\.{_TEXT}(?:{_PEFT}|{_OLD})")

PROGRAMS = (
    # a layer's name is what stands before the first dot of a key: no dotted name is found
    Program("A1111", (_kohya(f"{_ATTN}|{_REST}|{_ENDS}"), _BUNDLE),
            "AUTOMATIC1111/stable-diffusion-webui: extensions-builtin/Lora/networks.py"),
    Program("Forge", _COMFY,
            "lllyasviel/stable-diffusion-webui-forge: packages_3rdparty/comfyui_lora_collection/lora.py"),
    Program("ComfyUI", _COMFY, "Comfy-Org/ComfyUI: comfy/lora.py, comfy/utils.py, comfy/weight_adapter/lora.py"),
    # what lies inside Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D, CLIPAttention and CLIPMLP
    Program("kohya", (_kohya(f"{_ATTN}|{_REST}"),), "kohya-ss/sd-scripts: networks/lora.py"),
    Program("diffusers",
            (_kohya(f"{_ATTN}|{_REST}|{_ENDS}"), rf"unet\.(?:{_ATTN}|{_REST}|{_ENDS})(?:{_PEFT}|{_OLD})",
             rf"unet\.{_OLD_ATTN}", rf"text_encoder\.{_TEXT}(?:{_PEFT}|{_OLD})"),
            "huggingface/diffusers: src/diffusers/loaders/lora_conversion_utils.py, lora_base.py, peft.py"),
)


@dataclass(frozen=True)
class Verdict:
    """What `program` makes of a file: `loaded` of its `total` layers, the keys it ignores, a caution if any."""

    program: str
    loaded: int
    total: int
    ignored: tuple[str, ...]
    caution: str = ""


def of_file(path: Path | str) -> list[Verdict]:
    """One verdict a program on a LoRA file. Raises `UserError` if it is none."""
    terms = [term for terms in load_adapter(path).deltas.values() for term in terms]
    return verdicts(read_header(path).tensors, [term.alpha for term in terms if isinstance(term, LowRank)])


def verdicts(keys: Iterable[str], alphas: Iterable[float] = ()) -> list[Verdict]:
    """One verdict a program on a file of these keys.

    `alphas`: those of the layers, if they are known; one program misreads files in which they differ.
    """
    keys, alphas = sorted(keys), set(alphas)
    layers = {key: _layer(key) for key in keys}
    total = len(set(layers.values()))
    found = []
    for program in PROGRAMS:
        pattern = re.compile("|".join(f"(?:{p})" for p in program.loads))
        ignored = tuple(key for key in keys if not pattern.fullmatch(key))
        loaded = total - len({layers[key] for key in ignored})
        caution = _diffusers_caution(keys, alphas) if program.name == "diffusers" else ""
        found.append(Verdict(program.name, loaded, total, ignored, caution))
    return found


def _layer(key: str) -> str:
    return re.sub(rf"(?:{_KOHYA}|{_PEFT}|{_OLD}|_lora\.(?:up|down)\.weight)$", "", key)


def _diffusers_caution(keys: list[str], alphas: set[float]) -> str:
    """What goes wrong in diffusers with keys that it does load; seen in 0.42 (a test would notice a change)."""
    if len(alphas) > 1 and any(key.startswith("lora_unet_") and "_attn" in key for key in keys):
        return "gives the UNet's attention layers one common alpha, where this file has several"
    text = [key for key in keys if key.startswith("text_encoder.")]
    if text and not any(".self_attn." in key for key in text):
        return "fails on a text encoder that has a LoRA on no attention layer"
    return ""
