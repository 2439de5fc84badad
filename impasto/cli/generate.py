"""`impasto generate`: pictures from prompts, a base and any number of adapters."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from impasto.cli.console import RichReporter, emit
from impasto.cli.options import Force, Json, Prediction, picture_size, refuse_existing, weighted
from impasto.core.errors import UserError
from impasto.core.files import atomic_write

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
    init: Annotated[Path | None, typer.Option(metavar="IMAGE", help="A picture to begin from.")] = None,
    strength: Annotated[float, typer.Option(
        min=0, max=1, metavar="X", help="How much of --init is drawn anew, 0 to 1.")] = 0.75,
    clip_skip: Annotated[int, typer.Option(
        min=0, metavar="N", help="Text encoder layers left out (A1111 counts one more).")] = 0,
    vae: Annotated[Path | None, typer.Option(metavar="FILE", help="Another VAE.")] = None,
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
        from impasto.families import pictures
        from impasto.families.load import load_base
        from impasto.families.picture_info import open_picture, save_picture
        from impasto.families.sampling import SampleSettings

    folders = [*(adapter_dir or []), Path()]
    files = tuple((pictures.find_adapter(name, folders), weight) for name, weight in map(weighted, adapter or []))
    shots = pictures.plan_shots(prompts, seeds, files, lambda name: pictures.find_adapter(name, folders))
    begin = open_picture(init) if init else None
    precision = _precision(dtype, device)
    loaded = load_base(base, family=family, vae=vae, device=precision.device, dtype=precision.dtype,
                       download=download, report=report, clip_skip=clip_skip, prediction=prediction)
    width, height = wish or _default_size(loaded, begin)
    settings = SampleSettings(steps=steps, guidance=guidance, scheduler=scheduler, width=width, height=height,
                              strength=strength)
    begin = pictures.fit_picture(begin, width, height) if begin else None
    drawn, written = [], []
    with precision.autocast(), _memory_is_enough():
        for shot, picture in pictures.draw(loaded, shots, settings, negative=negative, batch=batch, init=begin,
                                           report=report):
            path = _file(out, shot.row, shot.seed)
            save_picture(picture, path, prompt=shot.prompt, negative=negative, seed=shot.seed, settings=settings,
                         base=loaded, adapters=shot.adapters, init=str(init or ""))
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
