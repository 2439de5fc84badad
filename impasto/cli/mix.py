"""`impasto mix` and `impasto resize`: sums of adapters, and adapters at lower ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from impasto.cli.arithmetic import (
    BlockWeights,
    By,
    Dtype,
    Energy,
    Out,
    Rank,
    Size,
    adapters_of,
    blocks_of,
    dtype_of,
    tell,
    wanted_of,
)
from impasto.cli.console import RichReporter
from impasto.cli.options import Force, Json

Base = Annotated[str | None, typer.Option(
    "--base", metavar="BASE", help="The checkpoint that a DoRA is for, whose change depends on it.")]
Layers = Annotated[bool, typer.Option("--layers", help="Say of each layer what is lost.")]


def mix(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[:W]", help="Adapters, each with its strength.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    by: By = "fro",
    size: Size = None,
    base: Base = None,
    blocks: BlockWeights = None,
    dtype: Dtype = "fp16",
    layers: Layers = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add adapters up, exactly or at a lower rank.

    They may be of any kinds, and strengths may be negative. New words and hypernetworks are carried along.
    """
    wanted, asked, factors = wanted_of(rank, energy, size, by, dtype), dtype_of(dtype), blocks_of(blocks)
    from impasto.families.load import locate
    from impasto.toolbox.mix import mix as add

    assert asked is not None
    tell(add(adapters_of(adapters), out, wanted=wanted, base=None if base is None else locate(base),
             blocks=factors, dtype=asked, force=force, report=RichReporter()), as_json, layers=layers)


def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter of any kind.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    by: By = "fro",
    size: Size = None,
    base: Base = None,
    dtype: Dtype = "fp16",
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

    assert asked is not None
    tell(shrink(adapter, wanted, out, base=None if base is None else locate(base), dtype=asked, force=force,
                report=RichReporter()), as_json, layers=layers)
