"""`impasto demo`: a real fine-tune of the embedded base, and a page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from impasto.cli.console import RichReporter, duration, emit, size
from impasto.cli.options import Force, Json

if TYPE_CHECKING:
    from impasto.evaluation.demo import DemoResult


def demo(
    style: Annotated[bool, typer.Option("--style", help="Teach it a style instead of a mascot.")] = False,
    out: Annotated[Path, typer.Option(
        "-o", "--out", metavar="FOLDER", help="Where all of it goes.")] = Path("impasto-demo"),
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the training and of the pictures.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Teach the embedded miniature something new, and write a page that shows it.

    It draws, trains and draws again, which takes about a minute and a half on two free processors and needs neither a
    graphics card nor the internet. An interrupted demo goes on with the same command.
    """
    report = RichReporter()
    with report.phase("starting"):  # torch and diffusers take seconds to import
        from impasto.evaluation.demo import Stopped, run_demo

    try:
        result = run_demo("style" if style else "mascot", out, seed, report, force=force)
    except Stopped as stopped:
        if as_json:
            emit({"stopped_after": stopped.step})
        else:
            print(f"stopped after step {stopped.step}, saved; the same command goes on from there")
        raise typer.Exit(128 + stopped.by if stopped.by is not None else 1) from None
    if as_json:
        emit(result.plain())
    else:
        _tell(result)


def _tell(result: DemoResult) -> None:
    scores = result.scores
    lines = {
        f"{result.lesson} recognised": f"{scores.recognised_before} pictures before, {scores.recognised_after} after",
        "backgrounds as asked": f"{scores.backgrounds}",
        "old prompts right": f"{scores.old_before} before, {scores.old_after} after",
        "adapter": f"{result.adapter}, {size(result.size)}",
        "time": f"{duration(sum(result.seconds.values()))}, and at most {size(result.memory)} of memory",
    }
    for name, text in lines.items():
        print(f"{name:<20}  {text}")
    print(result.page)
