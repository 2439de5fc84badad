"""`impasto merge`: adapters into a checkpoint, or checkpoints with checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from impasto.cli.arithmetic import BlockWeights, Dtype, Out, adapters_of, blocks_of, dtype_of
from impasto.cli.console import RichReporter, emit, size
from impasto.cli.options import Force, Json
from impasto.core.files import size_of


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint file, a diffusers folder, or mini.")],
    others: Annotated[list[str], typer.Argument(
        metavar="ADAPTER[:W]", help="Adapters, each with its strength; or, with --weights or --add-difference, the "
        "other checkpoints.")],
    out: Out,
    weights: Annotated[str | None, typer.Option(
        "--weights", metavar="0.7,0.3", help="Checkpoints: the sum with these weights, BASE's first.")] = None,
    difference: Annotated[float | None, typer.Option(
        "--add-difference", metavar="W", help="Three checkpoints A B C: A + W · (B − C).")] = None,
    blocks: BlockWeights = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a checkpoint, or checkpoints with each other.

    The result has BASE's layout and types. It is written as a stream: memory holds one tensor at a time.
    """
    if weights is not None and difference is not None:
        raise typer.BadParameter("and --add-difference exclude each other", param_hint="--weights")
    if difference is not None and len(others) != 2:
        raise typer.BadParameter("takes three checkpoints, A B C", param_hint="--add-difference")
    asked, factors = None if dtype is None else dtype_of(dtype), blocks_of(blocks)
    try:
        numbers = [float(number) for number in (weights or "").split(",") if number]
    except ValueError:
        raise typer.BadParameter(f"{weights!r} is no list of numbers", param_hint="--weights") from None
    from impasto.families.load import locate
    from impasto.toolbox.merge import add_difference, merge_adapters, merge_checkpoints

    report = RichReporter()
    first = locate(base)
    if difference is not None:
        tuned, origin = map(locate, others)
        told = add_difference(first, tuned, origin, difference, out, blocks=factors, dtype=asked, force=force,
                              report=report)
    elif weights is not None:
        told = merge_checkpoints([first, *map(locate, others)], numbers, out, blocks=factors, dtype=asked, force=force,
                                 report=report)
    else:
        told = merge_adapters(first, adapters_of(others), out, blocks=factors, dtype=asked, force=force,
                              report=report)
    count = size_of(out)
    if as_json:
        return emit({"file": str(out), "bytes": count, "changed": told.changed, "remarks": list(told.remarks)})
    for remark in told.remarks:
        print(remark)
    what = "tensors" if weights is not None or difference is not None else "layers"
    print(f"{size(count):>9}  {out}, {told.changed} {what} changed")
