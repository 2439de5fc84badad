"""`impasto generate`: pictures from prompts, a base and any number of adapters."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from impasto.cli.console import RichReporter, emit
from impasto.cli.drawings import short
from impasto.cli.options import Force, Json, Prediction, own_option, picture_size, refuse_existing, weighted
from impasto.core.errors import UserError
from impasto.core.files import atomic_write
from impasto.core.progress import Reporter

if TYPE_CHECKING:
    from PIL import Image

    from impasto.families.base import Base
    from impasto.training.environment import Precision

#: of --dtype
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def generate(
    base: Annotated[str, typer.Argument(
        metavar="BASE", help="A checkpoint file, a diffusers folder, a hub id, or mini, the embedded base.")],
    prompts: Annotated[list[str], typer.Argument(
        metavar="PROMPT", help="What to draw; (word:1.2) weighs a word, <lora:name:0.8> adds an adapter.")],
    adapter: Annotated[list[str] | None, typer.Option(
        metavar="FILE[:STRENGTH]", help="An adapter for all prompts; may be given several times.")] = None,
    adapter_dir: Annotated[list[Path] | None, typer.Option(
        metavar="FOLDER", help="Where <lora:name> looks, before the current folder.")] = None,
    out: Annotated[Path, typer.Option(
        "-o", "--out", metavar="FOLDER", help="Where the pictures go.")] = Path("pictures"),
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What to keep away from.")] = "",
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Sampler steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0, metavar="X", help="Classifier-free guidance; 1 is none.")] = 7.5,
    scheduler: Annotated[str, typer.Option(metavar="NAME", help="The sampler.")] = "dpm++2m",
    size: Annotated[str | None, typer.Option(
        metavar="WxH", help="In pixels; default: as the base was trained, in --init's shape.")] = None,
    seed: Annotated[int | None, typer.Option(
        min=0, metavar="N", help="Of each prompt's first picture; default: a new one.")] = None,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures of each prompt, seeds counting up.")] = 1,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures drawn at once.")] = 1,
    init: Annotated[Path | None, typer.Option(
        metavar="IMAGE", help="A picture to begin from; for an instruct-pix2pix base, to edit.")] = None,
    mask: Annotated[Path | None, typer.Option(
        metavar="IMAGE", help="What of --init is drawn anew: white. For inpainting bases, and others.")] = None,
    strength: Annotated[float | None, typer.Option(
        min=0, max=1, metavar="X", help="How much of --init is drawn anew, 0 to 1; default: 0.75, 1 with --mask.")
    ] = None,
    image_guidance: Annotated[float | None, typer.Option(
        min=0, metavar="X", help="Guidance by --init of an instruct-pix2pix base; default: 1.5.")] = None,
    refiner: Annotated[str | None, typer.Option(
        metavar="BASE", help="A base that draws the last steps: SDXL's refiner.")] = None,
    handover: Annotated[float | None, typer.Option(
        metavar="X", help="The share of the noise levels that the base draws before --refiner takes over; default: "
        "0.8.")] = None,
    clip_skip: Annotated[int, typer.Option(
        min=0, metavar="N", help="Text encoder layers left out (A1111 counts one more).")] = 0,
    vae: Annotated[Path | None, typer.Option(metavar="FILE", help="Another VAE.")] = None,
    text_encoder: Annotated[list[str] | None, typer.Option(
        metavar="FILE", help="A text encoder alone, for a base without (SD 3); may be given several times.")] = None,
    base_option: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE", help="A setting of the family's own, as t5=false of SD 3.")] = None,
    prediction: Prediction = None,
    family: Annotated[str | None, typer.Option(metavar="NAME", help="Where the base's own word is not enough.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Let a hub id be fetched from the internet.")] = False,
    dtype: Annotated[str, typer.Option(metavar="auto|fp32|bf16|fp16", help="Precision.")] = "auto",
    device: Annotated[str, typer.Option(metavar="auto|cuda|mps|cpu", help="Where to compute.")] = "auto",
    grid: Annotated[bool, typer.Option("--grid", help="One more file, with all of them, a row a prompt.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts, with adapters if you like."""
    wish = picture_size(size) if size else None
    if dtype not in PRECISIONS:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(PRECISIONS)}", param_hint="--dtype")
    first = secrets.randbelow(2**32) if seed is None else seed
    seeds = range(first, first + count)
    sheet = out / f"grid-{first}.png" if grid else None
    refuse_existing([_file(out, row, s) for row in range(len(prompts)) for s in seeds] + ([sheet] if sheet else []),
                    force)
    report = RichReporter()
    with report.phase("starting"):  # torch and diffusers take seconds to import
        from impasto.data.inventory import CELL
        from impasto.families import pictures
        from impasto.families.load import load_base
        from impasto.families.picture_info import open_picture, save_picture
        from impasto.families.sample_settings import SampleSettings, check_size

    asked = SampleSettings(steps=steps, guidance=guidance, scheduler=scheduler,  # errors before the base is loaded
                           **_given(strength=strength, image_guidance=image_guidance, handover=handover))
    if wish:
        check_size(CELL, *wish)
    folders = [*(adapter_dir or []), Path()]
    files = tuple((pictures.find_adapter(name, folders), weight) for name, weight in map(weighted, adapter or []))
    shots = pictures.plan_shots(prompts, seeds, files, lambda name: pictures.find_adapter(name, folders))
    if mask and not init:
        raise UserError("a mask is of a picture", where=mask, fix="give the picture with --init")
    if strength is not None and not init:
        raise UserError("says how much of a picture is drawn anew", where="--strength", fix="give it with --init")
    if handover is not None and not refiner:
        raise UserError("says when another base takes over", where="--handover", fix="give it with --refiner")
    begin, hole = open_picture(init) if init else None, open_picture(mask) if mask else None
    precision = _precision(dtype, device)
    loaded = load_base(base, family=family, vae=vae, device=precision.device, dtype=precision.dtype,
                       download=download, report=report, clip_skip=clip_skip, prediction=prediction,
                       text_encoders=text_encoder or (), options=dict(map(own_option, base_option or ())))
    finisher = load_base(refiner, device=precision.device, dtype=precision.dtype, download=download, report=report) \
        if refiner else None
    pictures.check_refiner(loaded, finisher, begin is not None)
    pictures.check_shown(loaded, begin is not None, hole is not None)
    _check_of_edits("picture" in loaded.extras, loaded.source, strength, image_guidance)
    _tell_unread([shot.text for shot in shots], loaded, report)
    width, height = wish or _default_size(loaded, begin)
    whole = strength is None and (mask or loaded.extras)
    settings = replace(asked, width=width, height=height, strength=1.0 if whole else asked.strength)
    hole = pictures.fit_mask(hole, begin, width, height) if hole and begin else None
    begin = pictures.fit_picture(begin, width, height) if begin else None
    drawn, written = [], []
    with precision.autocast(), _memory_is_enough():
        for shot, picture in pictures.draw(loaded, shots, settings, negative=negative, batch=batch, init=begin,
                                           mask=hole, refiner=finisher, report=report):
            path = _file(out, shot.row, shot.seed)
            save_picture(picture, path, prompt=shot.prompt, negative=negative, seed=shot.seed, settings=settings,
                         base=loaded, adapters=shot.adapters, init=str(init or ""), mask=str(mask or ""),
                         refiner=finisher)
            written.append({"file": str(path), "prompt": shot.prompt, "seed": shot.seed})
            if not as_json:
                print(path, flush=True)
            if sheet:
                drawn.append(picture)
    if sheet:
        _save_grid(drawn, len(seeds), sheet)
    if as_json:
        emit({"pictures": written, "grid": str(sheet) if sheet else None})
    elif sheet:
        print(sheet)


def _file(folder: Path, row: int, seed: int) -> Path:
    """The file of one picture: which prompt it shows, counted from 1, and its seed."""
    return folder / f"{row + 1:03}-{seed}.png"


def _given(**values: float | None) -> dict[str, Any]:
    """Those that are; the others have their defaults."""
    return {name: value for name, value in values.items() if value is not None}


def _check_of_edits(edits: bool, source: Path | None, strength: float | None, image_guidance: float | None) -> None:
    """That options which only a base that edits pictures has, or only the others, are not given in vain."""
    if edits and strength is not None:
        raise UserError("is an instruct-pix2pix base: it edits a picture and does not begin from it", where=source,
                        fix="leave --strength out; --image-guidance says how much stays")
    if not edits and image_guidance is not None:
        raise UserError("is no instruct-pix2pix base, which --image-guidance is of", where=source, fix="leave it out")


def _tell_unread(prompts: Sequence[str], base: Base, report: Reporter) -> None:
    from impasto.data.wording import cut_to
    from impasto.families.prompts import parse

    limit = base.longest
    for prompt in dict.fromkeys(prompts) if limit is not None else ():
        if limit is not None and (lost := cut_to(parse(prompt), limit)[1]):
            report.note(f"CLIP reads {limit} tokens of a prompt in this family, and not: '{short(lost, 80)}'")


def _default_size(base: Base, begin: Image.Image | None) -> tuple[int, int]:
    """Width and height: what the base was made for, in the shape of the initial picture if there is one."""
    if begin is None:
        return base.native_size, base.native_size
    scale = base.native_size / math.sqrt(begin.width * begin.height)
    width, height = (max(round(side * scale / (8 * base.cell)), 1) * 8 * base.cell for side in begin.size)
    return width, height


def _precision(dtype: str, device: str) -> Precision:
    from impasto.training.environment import DTYPES, Precision, choose_device

    place = choose_device(device)
    return Precision.choose("auto", place) if dtype == "auto" else Precision(place, DTYPES[dtype])


@contextlib.contextmanager
def _memory_is_enough() -> Iterator[None]:
    """Turns a full device into a line of advice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError("the device's memory is full", fix="try --batch 1, a smaller --size or --dtype bf16") from None


def _save_grid(pictures: Sequence[Image.Image], columns: int, path: Path) -> None:
    """All pictures in one, a row for each prompt."""
    from PIL import Image

    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * columns, height * (len(pictures) // columns)))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")
