"""`impasto convert`: a checkpoint in the other layout, an adapter in another format or as another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from impasto.cli.arithmetic import (
    Base,
    By,
    Dtype,
    Energy,
    Factor,
    Layers,
    Out,
    Rank,
    Size,
    dtype_of,
    tell,
    wanted_of,
)
from impasto.cli.console import RichReporter
from impasto.cli.options import Force, Json, Prediction


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint file, a diffusers folder, or an adapter.")],
    out: Out,
    to: Annotated[str | None, typer.Option(
        "--to", metavar="FORMAT", help="A checkpoint: ldm (a single file) or diffusers (a folder); default: the other "
        "one. An adapter: kohya, webui, comfyui, lycoris, diffusers or peft.")] = None,
    kind: Annotated[str | None, typer.Option(
        "--kind", metavar="lora|lokr", help="An adapter's changes as LoRAs, exactly or at --rank; or as the nearest "
        "LoKrs.")] = None,
    rank: Rank = None,
    energy: Energy = None,
    by: By = "fro",
    size: Size = None,
    factor: Factor = None,
    base: Base = None,
    dtype: Dtype = None,
    prediction: Prediction = None,
    layers: Layers = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a file for another program, or an adapter as another kind.

    Checkpoints keep their numbers to the bit, adapters are written in fp16, unless --dtype says otherwise.
    """
    wanted, asked = wanted_of(rank, energy, size, by, dtype), None if dtype is None else dtype_of(dtype)
    if factor is not None and kind != "lokr":
        raise typer.BadParameter("is of a LoKr: say --kind lokr", param_hint="--factor")
    from impasto.families.load import locate
    from impasto.toolbox.convert import convert as turn
    from impasto.toolbox.extract import FACTOR

    path = locate(file) if str(file) == "mini" else file
    own = None if base is None else locate(base)
    tell(turn(path, out, to=to, kind=kind, wanted=wanted, factor=factor or FACTOR, base=own, dtype=asked,
              prediction=prediction, force=force, report=RichReporter()), as_json, layers=layers)
