"""`impasto train`: fine-tune from a recipe; the same command again goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from impasto.cli.console import RichReporter, duration, emit
from impasto.cli.options import Json

if TYPE_CHECKING:
    from impasto.training.recipe import Recipe


def _ready(pattern: str) -> str:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent.parent / "recipes"
    return ", ".join(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in
                            folder.glob(f"{pattern}.toml") if not path.stem.startswith("pretrain")))


def train(
    recipe: Annotated[str, typer.Argument(
        metavar="RECIPE", help=f"A TOML file, or a ready recipe's name: {_ready('*')}; and on the embedded base "
        f"{_ready('mini/*')}.")],
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="SECTION.KEY=VALUE", help="Settings that the recipe leaves out or has otherwise: "
        "base.path=v1-5.safetensors data.folder=photos train.steps=800; prior.folder= takes the recipe's own "
        "away.")] = None,
    verify: Annotated[bool, typer.Option(
        "--verify-resume", help="Prove in a few steps, in a temporary folder, that a stopped run goes on "
        "exactly.")] = False,
    find_rate: Annotated[bool, typer.Option(
        "--find-rate", help="Try learning rates in short runs, in a temporary folder, and say which one still "
        "improves on held-out pictures.")] = False,
    accept: Annotated[bool, typer.Option(
        "--accept-changes", help="Go on with a run although its recipe or its pictures have changed since.")] = False,
    explain: Annotated[bool, typer.Option(
        "--explain", help="Train nothing: say each setting, where it comes from, and why.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune from a recipe.

    The run lives in output.dir: previews, log, checkpoints, and at the end the adapter. Ctrl-C (or SIGTERM)
    saves first; the same command goes on exactly where it stopped, also after a crash.
    """
    if explain:
        from impasto.cli.explanation import show

        return show(recipe, settings or [], as_json=as_json)
    from impasto.training.recipe import load_recipe

    checked = load_recipe(recipe, settings or [])
    if verify:
        prove(checked, as_json)
        return
    if find_rate:
        from impasto.cli.rates import find

        return find(checked, as_json=as_json)
    from impasto.planning.before import look_ahead
    from impasto.training.trainer import train as run

    report = RichReporter()
    checked, found = look_ahead(checked, report)
    outcome = run(checked, report, accept_changes=accept, foreseen=None if found is None else {
        "peak_bytes": found.peak_bytes, "allocated": found.allocated, "parts": dict(found.parts)})
    if found is not None and outcome.allocated is not None:
        from impasto.planning.drift import record
        from impasto.training.environment import choose_device

        told = found.in_steps if choose_device(checked.train.device).type == "cpu" else found.allocated
        record(checked.output.name or Path(checked.output.dir).name, told, outcome.allocated,
               {"precision": checked.train.precision, "methods": " ".join(method.kind for method in checked.method)})
    if outcome.rank:
        pass  # the first process tells of it
    elif as_json:
        emit({"artifact": outcome.artifact and str(outcome.artifact), "step": outcome.step,
              "resumed_from": outcome.resumed_from, "loss": outcome.loss, "seconds": round(outcome.seconds, 3),
              "stopped_by": outcome.stopped_by and outcome.stopped_by.name, "validation": outcome.validation,
              "ended": outcome.ended})
    elif outcome.artifact is not None:
        steps = outcome.step - outcome.resumed_from
        print(f"{outcome.artifact}" + (f"  ({steps} steps in {duration(outcome.seconds)})" if steps else
                                       "  (finished before; nothing was left to do)"))
    else:
        print(f"stopped after step {outcome.step}, saved; the same command goes on from there")
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + outcome.stopped_by)


def prove(recipe: Recipe, as_json: bool) -> None:
    """Run the proof of exact resume, and say how it went; exit code 1 if it failed."""
    from impasto.training.proof import STEPS, STOP, verify_resume

    proof = verify_resume(recipe, RichReporter())
    if as_json:
        emit({"exact": proof.exact, "tensors": proof.tensors, "differing": proof.differing})
    elif proof.exact:
        print(f"exact: {STEPS} steps, stopped after {STOP}; all {proof.tensors} tensors of weights and optimizer are "
              "equal to the bit")
    else:
        worst = max(proof.differing, key=lambda name: proof.differing[name])
        print(f"not exact: {len(proof.differing)} of {proof.tensors} tensors differ, {worst} by "
              f"{proof.differing[worst]:.2g}; on CUDA, train.deterministic=true makes kernels add in a fixed order")
    if not proof.exact:
        raise typer.Exit(1)
