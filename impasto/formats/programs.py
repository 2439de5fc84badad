"""Which layers of an adapter's file each program of the field would load, and which it would pass over in silence.

Told from the names of the keys, by each program's own names of a family's layers (`program_names`). A program that does
not know a key skips it; a file "works" then without effect. Some refuse a file whole instead, for one key or for many.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from impasto.deltas.told import alpha_of
from impasto.formats.adapters import load_adapter
from impasto.formats.detect import TITLES
from impasto.formats.embeddings import BUNDLE
from impasto.formats.header import read_header
from impasto.formats.program_names import ANY, LYCORIS, PEFT_DORA, PROGRAMS, Program

#: families of adapters of which this room can tell; without a name, as for the first
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "")

#: what becomes of new tokens in programs that do not know them
IGNORES_TOKENS, REFUSES_TOKENS = "ignores the new tokens", "refuses a file with new tokens in it"


@dataclass(frozen=True)
class Verdict:
    """What `program` makes of a file: `loaded` of its `total` layers, the keys it ignores, a caution if any.

    A new token is no layer; a program that does not know it says so in the caution. One that refuses the whole file
    ignores all keys, and the caution says why.
    """

    program: str
    loaded: int
    total: int
    ignored: tuple[str, ...]
    caution: str = ""


def of_file(path: Path | str) -> list[Verdict]:
    """One verdict a program on an adapter's file, none for a family not in FAMILIES. Raises `UserError` if it is none.
    """
    adapter = load_adapter(path)
    if adapter.family not in FAMILIES:
        return []
    alphas = [alpha for terms in adapter.deltas.values() for term in terms if (alpha := alpha_of(term)) is not None]
    return verdicts(read_header(path).tensors, alphas, adapter.family)


def verdicts(keys: Iterable[str], alphas: Iterable[float] = (), family: str = "") -> list[Verdict]:
    """One verdict a program on a file of these keys, for a base of that family (one of FAMILIES).

    `alphas`: those of the layers, if they are known; one program misreads files in which they differ.
    """
    keys, alphas = sorted(keys), set(alphas)
    layers = {key: _layer(key) for key in keys if not key.startswith(BUNDLE)}
    total = len(set(layers.values()))
    found = []
    for program in PROGRAMS:
        ignored = _ignored(program, keys, family or "sd1")
        refusal = _refusal(program, keys, ignored, family or "sd1")
        if refusal:
            ignored = keys
        loaded = total - len({layers[key] for key in ignored if key in layers})
        caution = refusal or _caution(program, keys, ignored, alphas if loaded else set())
        found.append(Verdict(program.name, loaded, total, tuple(ignored), caution))
    return found


def lycoris(keys: Iterable[str]) -> bool:
    """Whether a file of these keys holds more than kohya's own LoRA: `networks.lora` does not read it."""
    return any(re.search(LYCORIS + "$", key) for key in keys)


def _ignored(program: Program, keys: list[str], family: str) -> list[str]:
    """The keys that a program passes over."""
    patterns = lycoris(keys) and program.extended.get(family) or program.loads.get(family, ())
    pattern, known = re.compile("|".join(f"(?:{p})" for p in patterns) or "(?!)"), set(keys)
    return [key for key in keys if not pattern.fullmatch(key) or program.name in ALONE and _alone(key, known)]


#: programs that take a bias, and a norm's weight, only beside the other of the two
ALONE = ("A1111", "kohya")


def _alone(key: str, known: set[str]) -> bool:
    layer, _, ending = key.partition(".")
    beside = {"diff_b": "diff", "b_norm": "w_norm", "w_norm": "b_norm"}.get(ending)
    return beside is not None and f"{layer}.{beside}" not in known


def _layer(key: str) -> str:
    return re.sub(rf"(?:{ANY}|{PEFT_DORA})$", "", key)


# --- whole files refused -----------------------------------------------------------------------------------

#: Forge gives a file up for more keys than these that it does not know
FORGES_LIMIT = 12
#: a name as kohya's files have it, in diffusers' eyes
_KOHYAS = re.compile(r"lora_(?:unet|te|te1|te2)_")
_LORA = re.compile(r".*\.(?:lora_up\.weight|lora_down\.weight|alpha)")


def _refusal(program: Program, keys: Collection[str], ignored: Collection[str], family: str) -> str:
    """Why a program loads nothing of a file; "" if it does load what it knows."""
    if family not in program.loads:
        return f"does not load adapters of {TITLES[family]}"
    match program.name:
        case "diffusers":
            return _refused_by_diffusers(keys, family)
        case "Forge" if len(ignored) > FORGES_LIMIT:
            return f"loads nothing of a file with {len(ignored)} keys that it does not know"
        case "A1111" if family == "sd3" and any(key.count(".") < 2 for key in keys):
            return "fails on SD 3 files with alphas in kohya's manner"
        case "kohya" if family == "sd3":
            names = {key.partition(".")[0] for key in keys if "lora_down" in key}
            if not all(f"{name}.alpha" in keys for name in names if name.startswith("lora_")):
                return "fails on SD 3 files without alphas"
    return ""


def _refused_by_diffusers(keys: Iterable[str], family: str) -> str:
    """It asks for the word "lora" in each key, and for nothing but LoRA's parts where all keys are kohya's."""
    keys = [key for key in keys if not key.endswith(".dora_scale")]  # those it drops beforehand
    if any("lora" not in key for key in keys):
        tokens = any(key.startswith(BUNDLE) for key in keys)
        return REFUSES_TOKENS if tokens else "refuses a file with a key that lacks the word lora"
    if family == "sdxl-refiner" and any(key.startswith(("lora_te_", "lora_te1_", "text_encoder.")) for key in keys):
        return "fails on the refiner's text encoder where it bears no number"
    if family == "sd3" or not all(map(_KOHYAS.match, keys)):
        return ""
    if not all(map(_LORA.fullmatch, keys)):
        return "refuses a file with more than LoRA in it"
    for blocks in ("input_blocks", "output_blocks"):  # it looks for `input_blocks_1` and finds `input_blocks_10` too
        numbers = {found[1] for key in keys if (found := re.search(rf"{blocks}_(\d+)", key))}
        if family.startswith("sdxl") and "1" in numbers and numbers & {"10", "11"}:
            return "fails on files that have both block 1 and block 10 or 11 in their original names"
    return ""


# --- cautions ----------------------------------------------------------------------------------------------


def _caution(program: Program, keys: list[str], ignored: Iterable[str], alphas: set[float]) -> str:
    """What goes wrong with keys that a program does load, what they take, and what becomes of new tokens."""
    own = _caution_of_layers(program, [key for key in keys if not key.startswith(BUNDLE)], alphas)
    if not any(key.startswith(BUNDLE) for key in ignored):
        return own
    return IGNORES_TOKENS + (f" and {own}" if own else "")


def _caution_of_layers(program: Program, keys: list[str], alphas: set[float]) -> str:
    """What goes wrong with layers' keys that a program does load, or what they take."""
    dora = any(key.endswith(".dora_scale") for key in keys)
    match program.name:
        case "diffusers":
            if dora and any(not re.search(LYCORIS + "$", key) for key in keys):
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
