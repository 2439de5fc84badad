"""Which layers of an adapter's file each program of the field would load, and which it would pass over in silence.

Told from the names of the keys, by each program's own map of names, for SD 1.x. A program that does not know a
key skips it; a file "works" then without effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from impasto.deltas.told import alpha_of
from impasto.formats.adapters import load_adapter
from impasto.formats.embeddings import BUNDLE
from impasto.formats.header import read_header

#: families of adapters of which this room can tell
FAMILIES = ("sd1", "")

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
_NORMS = "|".join((_BLOCKS + r"\.resnets\.\d+\.norm[12]", _ATTENTION + r"\.norm", _TRANSFORMER + r"\.norm[123]"))
_TEXT_NORMS = r"text_model\.encoder\.layers\.\d+\.layer_norm[12]"
_KOHYA = r"\.(?:lora_up\.weight|lora_down\.weight|alpha)"
#: what LyCORIS adds to kohya's
_LYCORIS = (r"\.(?:lora_mid\.weight|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff|diff_b|w_norm|b_norm|"
            r"dora_scale)")
_PEFT = r"\.lora_[AB]\.weight"
_BUNDLE = r"bundle_emb\.[^.]+\.(?:string_to_param\..+|clip_[lg]|emb_params)"  # new tokens beside the layers
_PEFT_DORA = r"\.lora_magnitude_vector"
_OLD = r"\.(?:lora|lora_linear_layer)\.(?:up|down)\.weight"
_OLD_ATTN = _TRANSFORMER + r"\.attn[12]\.processor\.to_(?:q|k|v|out)_lora\.(?:up|down)\.weight"


def _kohya(unet: str, text: str = _TEXT, endings: str = _KOHYA, prefix: str = "lora_unet_") -> str:
    """A pattern for kohya's keys: of the text encoder's layers and of the UNet's that patterns name."""
    flat = [pattern.replace(r"\.", "_") for pattern in (unet, text)]
    return rf"(?:{prefix}(?:{flat[0]})|lora_te_(?:{flat[1]}))(?:{endings})"


#: what becomes of new tokens in programs that do not know them
IGNORES_TOKENS, REFUSES_TOKENS = "ignores the new tokens", "refuses a file with new tokens in it"


@dataclass(frozen=True)
class Program:
    """`loads`: a key is loaded if one of these patterns matches all of it. `source`: where that is seen."""

    name: str
    loads: tuple[str, ...]
    source: str
    #: what is loaded in place of that if the file holds anything of LyCORIS', and what that takes
    extended: tuple[str, ...] = ()
    extension: str = ""
    #: whether it refuses a whole file for one unknown key among kohya's, or one without the word "lora" in it
    strict: bool = False


# in ComfyUI's map dotted names have `.processor.` before `to_q` and no `.0` after `to_out`, so attention in peft's
# spelling is not among them
_BOTH = f"{_KOHYA}|{_LYCORIS}"
_COMFY = (_kohya(f"{_ATTN}|{_REST}|{_ENDS}|{_NORMS}|conv_norm_out", endings=_BOTH,
                 prefix="(?:lora_unet|lycoris)_"), rf"(?:unet\.)?(?:{_REST}|{_ENDS})(?:{_PEFT}|{_OLD})",
          rf"(?:unet\.)?{_OLD_ATTN}", rf"text_encoder\.{_TEXT}(?:{_PEFT}|{_OLD})")

PROGRAMS = (
    # a layer's name is what stands before the first dot of a key: no dotted name is found
    Program("A1111", (_kohya(f"{_ATTN}|{_REST}|{_ENDS}|{_NORMS}", f"{_TEXT}|{_TEXT_NORMS}", _BOTH), _BUNDLE),
            "AUTOMATIC1111/stable-diffusion-webui: extensions-builtin/Lora/networks.py, network_*.py"),
    Program("Forge", _COMFY,
            "lllyasviel/stable-diffusion-webui-forge: packages_3rdparty/comfyui_lora_collection/lora.py"),
    Program("ComfyUI", _COMFY, "Comfy-Org/ComfyUI: comfy/lora.py, comfy/utils.py, comfy/weight_adapter/*.py"),
    # what lies inside Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D, CLIPAttention and CLIPMLP
    # in an extension, every module of both networks
    Program("kohya", (_kohya(f"{_ATTN}|{_REST}"),), "kohya-ss/sd-scripts: networks/lora.py; LyCORIS: kohya.py",
            (_kohya(f"{_ATTN}|{_REST}|{_ENDS}|{_NORMS}|conv_norm_out",
                    rf"{_TEXT}|{_TEXT_NORMS}|text_model\.final_layer_norm", _BOTH),),
            "needs the package lycoris-lora, and --network_module lycoris.kohya"),
    Program("diffusers",
            (_kohya(f"{_ATTN}|{_REST}|{_ENDS}"), rf"unet\.(?:{_ATTN}|{_REST}|{_ENDS})(?:{_PEFT}|{_PEFT_DORA}|{_OLD})",
             rf"unet\.{_OLD_ATTN}", rf"text_encoder\.{_TEXT}(?:{_PEFT}|{_PEFT_DORA}|{_OLD})"),
            "huggingface/diffusers: src/diffusers/loaders/lora_conversion_utils.py, lora_pipeline.py, peft.py",
            strict=True),
)


@dataclass(frozen=True)
class Verdict:
    """What `program` makes of a file: `loaded` of its `total` layers, the keys it ignores, a caution if any.

    A new token is no layer; a program that does not know it says so in the caution.
    """

    program: str
    loaded: int
    total: int
    ignored: tuple[str, ...]
    caution: str = ""


def of_file(path: Path | str) -> list[Verdict]:
    """One verdict a program on an adapter's file. Raises `UserError` if it is none."""
    terms = [term for terms in load_adapter(path).deltas.values() for term in terms]
    alphas = [alpha for term in terms if (alpha := alpha_of(term)) is not None]
    return verdicts(read_header(path).tensors, alphas)


def verdicts(keys: Iterable[str], alphas: Iterable[float] = ()) -> list[Verdict]:
    """One verdict a program on a file of these keys.

    `alphas`: those of the layers, if they are known; one program misreads files in which they differ.
    """
    keys, alphas = sorted(keys), set(alphas)
    layers = {key: _layer(key) for key in keys if not key.startswith(BUNDLE)}
    total = len(set(layers.values()))
    extended = lycoris(keys)
    found = []
    for program in PROGRAMS:
        ignored = _ignored(program, keys, extended)
        loaded = total - len({layers[key] for key in ignored if key in layers})
        found.append(Verdict(program.name, loaded, total, ignored, _caution(program, keys, ignored, alphas)))
    return found


def lycoris(keys: Iterable[str]) -> bool:
    """Whether a file of these keys holds more than kohya's own LoRA: `networks.lora` does not read it."""
    return any(re.search(_LYCORIS + "$", key) for key in keys)


def _ignored(program: Program, keys: list[str], extended: bool) -> tuple[str, ...]:
    """The keys that a program passes over."""
    pattern = re.compile("|".join(f"(?:{p})" for p in (extended and program.extended or program.loads)))
    known = set(keys)
    ignored = [key for key in keys if not pattern.fullmatch(key) or
               program.name in ALONE and _alone(key, known)]
    if program.strict:
        read = [key for key in keys if not key.endswith(".dora_scale")]  # those it drops beforehand
        kohyas = all(re.match(r"lora_(?:unet|te\d?)_", key) for key in read)
        if any("lora" not in key for key in read) or kohyas and not set(read).isdisjoint(ignored):
            return tuple(keys)
    return tuple(ignored)


#: programs that take a bias, and a norm's weight, only beside the other of the two
ALONE = ("A1111", "kohya")


def _alone(key: str, known: set[str]) -> bool:
    layer, _, ending = key.partition(".")
    beside = {"diff_b": "diff", "b_norm": "w_norm", "w_norm": "b_norm"}.get(ending)
    return beside is not None and f"{layer}.{beside}" not in known


def _layer(key: str) -> str:
    return re.sub(rf"(?:{_BOTH}|{_PEFT}|{_PEFT_DORA}|{_OLD}|_lora\.(?:up|down)\.weight)$", "", key)


def _caution(program: Program, keys: list[str], ignored: Iterable[str], alphas: set[float]) -> str:
    """What goes wrong with keys that a program does load, what they take, and what becomes of new tokens."""
    own = _caution_of_layers(program, [key for key in keys if not key.startswith(BUNDLE)], alphas)
    if not any(key.startswith(BUNDLE) for key in ignored):
        return own
    if program.strict:
        return REFUSES_TOKENS
    return IGNORES_TOKENS + (f" and {own}" if own else "")


def _caution_of_layers(program: Program, keys: list[str], alphas: set[float]) -> str:
    """What goes wrong with layers' keys that a program does load, or what they take."""
    dora = any(key.endswith(".dora_scale") for key in keys)
    match program.name:
        case "diffusers":
            if dora and any(not re.search(_LYCORIS + "$", key) for key in keys):
                return "leaves DoRA's magnitudes out, so the rest has another effect"
            return _diffusers_caution(keys, alphas)
        case "A1111" if dora:
            return "takes DoRA's magnitudes as the inputs', so those of outputs have another effect"
        case "ComfyUI" | "Forge" if dora:
            return "divides by the norm of the unchanged weight where DoRA's magnitudes are the outputs'"
        case "ComfyUI" | "Forge" if any(key.endswith(".lokr_t2") for key in keys):
            return "fails on a LoKr's Tucker core with torch 2.13, and leaves that layer as it was"
        case "kohya" if lycoris(keys):
            return program.extension
    return ""


def _diffusers_caution(keys: list[str], alphas: set[float]) -> str:
    """What goes wrong in diffusers with keys that it does load; seen in 0.42 (a test would notice a change)."""
    if len(alphas) > 1 and any(key.startswith("lora_unet_") and "_attn" in key for key in keys):
        return "gives the UNet's attention layers one common alpha, where this file has several"
    text = [key for key in keys if key.startswith("text_encoder.")]
    if text and not any(".self_attn." in key for key in text):
        return "fails on a text encoder that has a LoRA on no attention layer"
    if any(key.endswith(".lora_magnitude_vector") for key in text):
        return "leaves DoRA's magnitudes in the text encoder out, so the rest has another effect"
    return ""
