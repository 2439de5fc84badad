"""Drawing many pictures: each with its own prompt, seed and adapters, in batches of those that share adapters."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from impasto.core.errors import UserError, nearest
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.deltas.adapter import Adapter
from impasto.families import prompts as language
from impasto.families.apply import apply, naming, notices
from impasto.families.base import Base
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import sample
from impasto.formats.adapters import load_adapter

#: adapters in force: file or folder, and strength
Adapters = tuple[tuple[Path, float], ...]


@dataclass(frozen=True)
class Shot:
    """One picture to be drawn. `prompt` as it was written, `text` without its `<lora:…>` tags."""

    prompt: str
    seed: int
    text: str
    adapters: Adapters = ()
    row: int = 0  # which of the prompts


def plan_shots(prompts: Sequence[str], seeds: Sequence[int], adapters: Adapters = (),
               find: Callable[[str], Path] = Path) -> list[Shot]:
    """Every prompt with every seed. `adapters` are in force for all; `find` takes a tag's name to its file."""
    shots = []
    for row, prompt in enumerate(prompts):
        text, tags = language.extract_loras(prompt)
        named = tuple((find(name), strength) for name, strength in tags)
        shots += [Shot(prompt, seed, text, adapters + named, row) for seed in seeds]
    return shots


def find_adapter(name: str, folders: Sequence[Path]) -> Path:
    """An adapter by its name: a path as it stands, or a file of that name in `folders`.

    Raises `UserError` that says what was looked at, with the nearest name there.
    """
    tails = (f"{name}.safetensors", f"{name}.pt", name)
    for candidate in [Path(name), *(folder / tail for folder in folders for tail in tails)]:
        if candidate.is_file() or (candidate / "adapter_config.json").is_file() or any(
                candidate.glob("*/adapter_config.json")):  # peft's, of one component or a folder for each
            return candidate
    if Path(name).is_dir():  # whoever loads it says what it lacks
        return Path(name)
    there = {path.stem for folder in folders if folder.is_dir() for ending in ("safetensors", "pt")
             for path in folder.glob(f"*.{ending}")}
    looked = ", ".join(f"{folder.absolute()}" for folder in folders)
    raise UserError(f"no adapter of that name; looked for it as a path and in {looked}", where=name,
                    fix=nearest(name, there) if there else "give its folder with --adapter-dir")


def fit_picture(picture: Image.Image, width: int, height: int) -> Image.Image:
    """`picture` upright, in RGB, scaled to cover width x height pixels, its middle cut out."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def fit_mask(mask: Image.Image, picture: Image.Image, width: int, height: int) -> Image.Image:
    """A `mask` of `picture`, of whatever size, as `fit_picture` fits that one: greys, black where it is transparent."""
    grey = ImageOps.exif_transpose(mask)
    if grey.mode in ("RGBA", "LA", "PA") or "transparency" in grey.info:
        grey = Image.alpha_composite(Image.new("RGBA", grey.size, "black"), grey.convert("RGBA"))
    whole = grey.convert("L").resize(ImageOps.exif_transpose(picture).size, Image.Resampling.BILINEAR)
    return ImageOps.fit(whole, (width, height), Image.Resampling.BILINEAR)


def check_shown(base: Base, picture: bool, mask: bool) -> None:
    """That a base is given the picture and the mask that it needs, and no more than it has a place for.

    Raises `UserError` that names the options of `impasto generate`.
    """
    what = f"is an {base.variant} base"
    if "mask" in base.extras and not (picture and mask):
        raise UserError(f"{what}: it fills the hole that a mask makes in a picture", where=base.source,
                        fix="give --init PICTURE and --mask MASK")
    if "picture" in base.extras and not picture:
        raise UserError(f"{what}: it edits a picture", where=base.source, fix="give --init PICTURE")
    if "picture" in base.extras and mask:
        raise UserError(f"{what}: it edits whole pictures, and has no place for a mask", where=base.source,
                        fix="leave --mask out")


def check_refiner(base: Base, refiner: Base | None, picture: bool) -> None:
    """That a refiner can go on where the base stops, and does not stand in its place.

    Raises `UserError` that names the options of `impasto generate`.
    """
    if base.refines and not picture:
        raise UserError("is a refiner: it finishes pictures, and begins none", where=base.source,
                        fix="give it as --refiner beside a base, or a picture with --init")
    if refiner is None:
        return
    if refiner.extras:
        raise UserError(f"is an {refiner.variant} base, and a refiner is shown no picture", where=refiner.source,
                        fix="take a plain one")
    same = [(each.latent_channels, each.latent_scale, each.cell, each.process.prediction == "flow")
            for each in (base, refiner)]
    if same[0] != same[1]:
        raise UserError(f"goes on from other latents than {base.family} makes", where=refiner.source,
                        fix="give SDXL's refiner to SDXL, or another checkpoint of the base's family")


def draw(base: Base, shots: Sequence[Shot], settings: SampleSettings, *, negative: str = "", batch: int = 1,
         init: Image.Image | None = None, mask: Image.Image | None = None, refiner: Base | None = None,
         report: Reporter = SILENT) -> Iterator[tuple[Shot, Image.Image]]:
    """Draw the shots in their order, each picture as soon as its batch is done.

    A picture depends on its own prompt, seed, adapters and the settings, and not on the batch it is drawn in
    (beyond rounding). `init`: a picture of the settings' size to begin from, or to edit; `mask`, of that size: what of
    it is drawn anew. A `refiner` draws the last steps. Adapters are attached, to the base alone, for the time of their
    pictures only. Raises `UserError` for an
    adapter that cannot be loaded or does not fit.
    """
    loaded: dict[Path, Adapter] = {}
    for path in dict.fromkeys(path for shot in shots for path, _ in shot.adapters):
        loaded[path] = load_adapter(path, family=base.family)
        with naming(path):
            told = notices(base, loaded[path])
        for line in told:
            report.note(f"{path.name}: {line}")
    whole = init is None or "picture" in base.extras
    steps = settings.steps if whole else max(int(settings.steps * settings.strength), 1)
    unwanted = _without_adapters(negative)
    with report.phase("drawing", len(shots) * steps, "steps") as advance:
        for adapters, group in itertools.groupby(shots, key=lambda shot: shot.adapters):
            with contextlib.ExitStack() as attached:
                for path, strength in adapters:
                    with naming(path):
                        applied = apply(base, loaded[path], strength)
                    attached.enter_context(applied)
                waiting = list(group)
                while waiting:
                    now, waiting = waiting[:batch], waiting[batch:]
                    pictures = sample(base, [language.parse(shot.text) for shot in now],
                                      [language.parse(unwanted)] * len(now), [shot.seed for shot in now], settings,
                                      init_images=[init] * len(now) if init else None,
                                      masks=[mask] * len(now) if mask else None, refiner=refiner,
                                      on_step=_counter(advance, len(now)))
                    yield from zip(now, pictures, strict=True)


def _without_adapters(negative: str) -> str:
    text, tags = language.extract_loras(negative)
    if tags:
        raise UserError("an adapter has no place in the negative prompt", where=f"<lora:{tags[0][0]}>",
                        fix="name it in the prompt")
    return text


def _counter(advance: Advance, pictures: int) -> Callable[[int, int], None]:
    """A step of a batch is one of each of its pictures."""
    return lambda done, steps: advance(pictures)
