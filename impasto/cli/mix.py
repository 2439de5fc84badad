"""`impasto mix`: sums of adapters, exact or at lower ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from impasto.cli.arithmetic import (
    AdapterDtype,
    Base,
    BlockWeights,
    By,
    Energy,
    Layers,
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


def mix(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[:W]", help="Adapters, each with its strength.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    by: By = "fro",
    size: Size = None,
    base: Base = None,
    blocks: BlockWeights = None,
    dtype: AdapterDtype = "fp16",
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

    tell(add(adapters_of(adapters), out, wanted=wanted, base=None if base is None else locate(base),
             blocks=factors, dtype=asked, force=force, report=RichReporter()), as_json, layers=layers)
