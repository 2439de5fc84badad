"""What the verbs of the toolbox share: options, how they are read, and how an outcome is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from impasto.cli.console import emit, size
from impasto.core.errors import UserError
from impasto.core.files import size_of
from impasto.core.weighted import Weighted

if TYPE_CHECKING:
    import torch

    from impasto.deltas.ranks import Wanted
    from impasto.toolbox.blocks import Blocks
    from impasto.toolbox.mix import Made

Out = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Where the result goes.")]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", help="The rank of every layer.")]
Energy = Annotated[float | None, typer.Option(
    "--energy", metavar="E", help="Instead: keep this share of each layer, 0 to 1; see --by.")]
By = Annotated[str, typer.Option(
    "--by", metavar="fro|cumulative|ratio", help="What the share is of: the Frobenius norm, the sum of the singular "
    "values, or the largest of them, which the smallest kept one is at least that part of.")]
Size = Annotated[str | None, typer.Option(
    "--size", metavar="40MB", help="Instead: a file of about this size, its ranks where they count most.")]
BlockWeights = Annotated[str | None, typer.Option(
    "--blocks", metavar="M00=0.5,…", help="A factor for each block: BASE, IN00 to IN11, M00, OUT00 to OUT11, as names "
    "or as 26 numbers; or the beginning of a layer's path, text_encoder=0.")]
Dtype = Annotated[str | None, typer.Option(
    "--dtype", metavar="fp16|bf16|fp32", help="The precision of the result; a checkpoint keeps its own without it.")]
AdapterDtype = Annotated[str, typer.Option("--dtype", metavar="fp16|bf16|fp32", help="The precision of the result.")]
Factor = Annotated[int | None, typer.Option(
    "--factor", min=2, metavar="N", help="LoKr: the largest side of its first factor, 8 unless said.")]
Base = Annotated[str | None, typer.Option(
    "--base", metavar="BASE", help="The checkpoint that a DoRA is for, whose change depends on it.")]
Layers = Annotated[bool, typer.Option("--layers", help="Say of each layer what is lost.")]

#: bytes of the units that people write
UNITS = {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "kib": 2**10, "m": 1e6, "mb": 1e6, "mib": 2**20, "g": 1e9, "gb": 1e9,
         "gib": 2**30}


def bytes_in(text: str) -> int:
    """40MB, 40 MiB, 1.5G, 40000000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise UserError("is no size", where=text, fix="write it as 40MB or 64MiB")
    return int(min(float(found[1]) * UNITS[found[2].lower()], 2**62))


def wanted_of(rank: int | None, energy: float | None, size: str | None, by: str, dtype: str | None) -> Wanted | None:
    """What --rank, --energy, --by and --size ask for; None where they ask for nothing."""
    from impasto.deltas.ranks import Measure, Wanted

    if by not in get_args(Measure):
        raise typer.BadParameter(f"{by!r} is not one of {', '.join(get_args(Measure))}", param_hint="--by")
    if by != "fro" and energy is None:
        raise typer.BadParameter("says what --energy is a share of", param_hint="--by")
    if rank is None and energy is None and size is None:
        return None
    return Wanted(rank, energy, None if size is None else bytes_in(size), measure=by,  # type: ignore[arg-type]
                  itemsize=4 if dtype == "fp32" else 2)


def adapters_of(texts: list[str]) -> list[Weighted]:
    """FILE:0.8 as a file and a strength. Raises `UserError` for a text that names none."""
    found = []
    for text in texts:
        try:
            found.append(Weighted.parse(text))
        except ValueError as error:
            raise UserError(str(error), where=repr(text), fix="write it as FILE or FILE:0.8") from None
    return found


def blocks_of(text: str | None) -> Blocks:
    from impasto.toolbox.blocks import PLAIN, Blocks

    return PLAIN if text is None else Blocks.parse(text)


def dtype_of(name: str) -> torch.dtype:
    """torch's type for fp16, bf16, fp32."""
    import torch

    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if name not in types:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(types)}", param_hint="--dtype")
    return types[name]


def tell(made: Made, as_json: bool, *, layers: bool = False) -> None:
    """What was written, and what was lost; with `layers`, of each layer."""
    ranks = [kept.rank for kept in made.layers.values()]
    if as_json:
        told: dict[str, Any] = {
            "files": [{"path": str(path), "bytes": size_of(path)} for path in made.files],
            "remarks": list(made.remarks), "error": made.error if made.layers else None,
            "layers": {layer: vars(kept) for layer, kept in made.layers.items()}}
        return emit(told)
    if layers and made.layers:
        print(" rank     lost       norm")
        for layer, kept in made.layers.items():
            print(f"{kept.rank or '':>5}  {100 * kept.error:6.2f}%  {kept.norm:9.3g}  {layer}")
    if ranks:
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        what = f"{len(ranks)} layers" + (f" at rank {span}" if any(ranks) else "")
        print(f"{what}; {100 * made.error:.2f}% of the whole change is lost (Frobenius norm)")
    for remark in made.remarks:
        print(remark)
    for path in made.files:
        print(f"{size(size_of(path)):>9}  {path}")
