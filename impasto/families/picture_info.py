"""What a picture tells of how it was made: text in its PNG, for other programs and for us.

`parameters` is the text that A1111 writes and that most programs and sites read; `impasto` is every setting as
JSON, from which the picture can be drawn again. Only the last part of a path goes in: pictures are shared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

import impasto
from impasto.core.errors import UserError
from impasto.core.files import atomic_write, no_such_file
from impasto.families.base import Base
from impasto.families.prompts import extract_loras
from impasto.families.sample_settings import SampleSettings
from impasto.families.variants import PIX2PIX
from impasto.formats.configs import CONFIGS

#: our samplers by A1111's names
SAMPLERS = {
    "ddim": "DDIM", "ddpm": "DDPM", "dpm++2m": "DPM++ 2M", "dpm++2m_karras": "DPM++ 2M Karras",
    "dpm++2m_sde": "DPM++ 2M SDE", "dpm++2m_sde_karras": "DPM++ 2M SDE Karras", "euler": "Euler",
    "euler_karras": "Euler Karras", "euler_a": "Euler a", "heun": "Heun", "lcm": "LCM", "lms": "LMS", "pndm": "PLMS",
    "unipc": "UniPC",
}


def save_picture(picture: Image.Image, path: Path | str, *, prompt: str, negative: str, seed: int,
                 settings: SampleSettings, base: Base, adapters: Sequence[tuple[Path | str, float]] = (),
                 init: str = "", mask: str = "", refiner: Base | None = None) -> None:
    """Write a PNG at `path`, whole or not at all, with all that made it. Equal pictures give equal files.

    `prompt` as the user wrote it; `adapters`: (file, strength) of those in force, last those that the prompt names;
    `init`: file of the picture that it began from, if any; `mask`: file of what of that was drawn anew; `refiner`: the
    base that drew the last steps, if another one did.
    """
    told = describe(prompt=prompt, negative=negative, seed=seed, settings=settings, base=base, adapters=adapters,
                    init=init, mask=mask, refiner=refiner)
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", parameters_text(told))
    text.add_text("impasto", json.dumps(told))
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=text)


def describe(*, prompt: str, negative: str, seed: int, settings: SampleSettings, base: Base,
             adapters: Sequence[tuple[Path | str, float]] = (), init: str = "",
             mask: str = "", refiner: Base | None = None) -> dict[str, Any]:
    """All settings of one picture, JSON-able."""
    return {
        "version": impasto.__version__,
        "base": _label(base.source) if base.source else "",
        "family": base.family,
        "refiner": _label(refiner.source) if refiner is not None and refiner.source else "",
        "text": base.text_settings(),
        **_loaded(base),
        "adapters": [{"file": Path(file).name, "strength": strength} for file, strength in adapters],
        "prompt": prompt,
        "negative": negative,
        "seed": seed,
        "variant": base.variant,
        "init": Path(init).name,
        "mask": Path(mask).name,
        "settings": dataclasses.asdict(settings),
    }


def _loaded(base: Base) -> dict[str, Any]:
    """What a base was loaded with beside its own file, and what that file may not tell."""
    others = {name: _label(checkpoint.path) for name, checkpoint in base.checkpoints.items()
              if checkpoint.path != base.source}
    usual, own = CONFIGS.get(base.family).scheduler.get("prediction_type"), base.process.prediction
    return {"options": base.own_settings(), "vae": others.get("vae", ""),
            "text_encoders": [others[name] for name in base.text_encoder_names if name in others],
            "prediction": own if own not in (usual, "flow") else ""}


def _label(source: Path) -> str:
    """A base by the last part of its path, or by its hub id where it lies in the hub's cache."""
    if source.parent.name == "snapshots":
        return source.parents[1].name.removeprefix("models--").replace("--", "/")
    return source.name


def parameters_text(told: Mapping[str, Any]) -> str:
    """A1111's infotext: the prompt, the negative prompt, and `Name: value` pairs on the last line.

    An adapter that the prompt does not name is added to it, as A1111 would ask for it.
    """
    settings = told["settings"]
    tags = "".join(f" <lora:{Path(adapter['file']).stem}:{adapter['strength']:g}>"
                   for adapter in unnamed_adapters(told))
    lines = [told["prompt"] + tags] + ([f"Negative prompt: {told['negative']}"] if told["negative"] else [])
    pairs = {
        "Steps": settings["steps"],
        "Sampler": SAMPLERS.get(settings["scheduler"], settings["scheduler"]),
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": told["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(told["base"]).stem,
    }
    if told["variant"] == PIX2PIX:
        pairs["Image CFG scale"] = f"{settings['image_guidance']:g}"
    elif told["init"]:
        pairs["Denoising strength"] = f"{settings['strength']:g}"
    if told["refiner"]:
        pairs["Refiner"] = Path(told["refiner"]).stem
        pairs["Refiner switch at"] = f"{settings['handover']:g}"
    if skipped := told["text"].get("clip_skip"):
        pairs["Clip skip"] = skipped + 1  # A1111 counts from 1
    pairs["Version"] = f"impasto {told['version']}"
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value != "")])


def unnamed_adapters(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The adapters in force that the prompt does not name itself; those that it names are listed last."""
    return told["adapters"][: len(told["adapters"]) - len(extract_loras(told["prompt"])[1])]


def _quoted(value: Any) -> str:
    """A1111 writes a value that holds its separators as a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def open_picture(path: Path | str) -> Image.Image:
    """The picture in a file, decoded. Raises `UserError`."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise no_such_file(path) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot be read as a picture ({error})", where=path) from error


def picture_texts(picture: Image.Image) -> dict[str, str]:
    """The texts of a PNG: `parameters`, `impasto` and whatever else; empty for other kinds of file."""
    return {name: str(text) for name, text in getattr(picture, "text", {}).items()}
