"""`impasto extract`: the adapter between two checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from impasto.cli.arithmetic import (
    AdapterDtype,
    By,
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
from impasto.cli.options import Force, Json

KINDS = ("lora", "lokr")


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint file or folder.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Another, fine-tuned from it.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    by: By = "fro",
    size: Size = None,
    kind: Annotated[str, typer.Option("--kind", metavar="lora|lokr", help="What to make of each layer.")] = "lora",
    factor: Factor = None,
    dtype: AdapterDtype = "fp16",
    layers: Layers = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of the difference between two checkpoints.

    What of each layer's change it holds is told. Both files are read in step, a layer at a time. Layers that did not
    change are left out.
    """
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is not one of {', '.join(KINDS)}", param_hint="--kind")
    wanted, asked = wanted_of(rank, energy, size, by, dtype), dtype_of(dtype)
    if kind == "lora" and wanted is None:
        raise typer.BadParameter("is needed, or --energy or --size", param_hint="--rank")
    if kind == "lokr" and wanted is not None:
        raise typer.BadParameter("is of a LoRA; a LoKr has a --factor", param_hint="--rank")
    if factor is not None and kind != "lokr":
        raise typer.BadParameter("is of a LoKr", param_hint="--factor")
    from impasto.families.load import locate
    from impasto.toolbox.extract import FACTOR
    from impasto.toolbox.extract import extract_to as make

    tell(make(locate(base), locate(tuned), out, wanted, kind=kind,  # type: ignore[arg-type]
              factor=factor or FACTOR, dtype=asked, force=force, report=RichReporter()), as_json, layers=layers)
