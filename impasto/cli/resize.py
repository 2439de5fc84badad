"""`impasto resize`: an adapter at lower ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from impasto.cli.arithmetic import AdapterDtype, Base, By, Energy, Layers, Out, Rank, Size, dtype_of, tell, wanted_of
from impasto.cli.console import RichReporter
from impasto.cli.options import Force, Json


def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter of any kind.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    by: By = "fro",
    size: Size = None,
    base: Base = None,
    dtype: AdapterDtype = "fp16",
    layers: Layers = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Bring an adapter to a lower rank, and say what is lost.

    Each layer becomes the best LoRA of its rank.
    """
    wanted, asked = wanted_of(rank, energy, size, by, dtype), dtype_of(dtype)
    if wanted is None:
        raise typer.BadParameter("is needed, or --energy or --size", param_hint="--rank")
    from impasto.families.load import locate
    from impasto.toolbox.mix import resize as shrink

    tell(shrink(adapter, wanted, out, base=None if base is None else locate(base), dtype=asked, force=force,
                report=RichReporter()), as_json, layers=layers)
