"""`impasto plan`: what a run will take, before its first step, and what to change so that it fits."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from impasto.cli.console import RichReporter, emit, size
from impasto.cli.options import Force, Json, refuse_existing
from impasto.core.errors import UserError
from impasto.core.files import atomic_write

if TYPE_CHECKING:
    from impasto.planning.cards import Card
    from impasto.planning.fit import Fit
    from impasto.planning.forecast import Forecast
    from impasto.planning.time import Speed
    from impasto.training.recipe import Recipe


@dataclass(frozen=True)
class Told:
    """All that is said of a recipe."""

    recipe: Recipe
    forecast: Forecast
    card: Card | None
    #: of one optimizer step, and where the figures of the card are from; None: nothing is known of it
    seconds: float | None
    origin: str
    better: Fit | None


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or a ready recipe's name.")],
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="SECTION.KEY=VALUE", help="Settings that the recipe leaves out or has otherwise. To plan without any "
        "file, base.family=sd1 (sd2, sdxl, sdxl-refiner, sd3) is enough.")] = None,
    card: Annotated[str | None, typer.Option(
        metavar="16GiB|'RTX 3060'", help="A card, or its memory: whether the run fits, and what makes it fit.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, as .png or .svg.")] = None,
    apply: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Write the recipe with the changes that make it fit.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say what a run will take, before its first step.

    The run is rehearsed on tensors that have shapes and no contents: no weights are read, no picture is looked at, and
    a base that is not there yet is planned as its authors have published it. It is for an NVIDIA card, unless the
    recipe says train.device = "cpu". Where it does not fit, the cheapest changes are looked for; each is rehearsed.
    """
    from impasto.planning.cards import card_of

    wanted = None if card is None else card_of(card)
    if apply is not None and wanted is None:
        raise typer.BadParameter("what is to be made fit needs a card: say --card", param_hint="--apply")
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"{picture.name} is neither .png nor .svg", param_hint="--picture")
    refuse_existing([file for file in (picture, apply) if file is not None], force)
    told = _told(recipe, settings or [], wanted)
    if picture is not None:
        from impasto.planning.drawn import draw

        draw(_columns(told), picture)
    if apply is not None:
        _write(told, apply)
    if as_json:
        return emit(document(told))
    for line in told.forecast.remarks:
        print(f"note: {line}", file=sys.stderr)
    show(told)
    for file in (picture, apply):
        if file is not None:
            print(file)


def _told(name: str, settings: Sequence[str], card: Card | None) -> Told:
    from impasto.planning.fit import fit
    from impasto.planning.memory import forecast
    from impasto.planning.sizes import artifact_bytes
    from impasto.planning.time import seconds_per_step
    from impasto.training.recipe import load_recipe

    recipe, report = load_recipe(name, settings), RichReporter()
    device = "cpu" if recipe.train.device == "cpu" else "cuda"
    with report.phase("rehearsing the run"):
        found = forecast(recipe, device)
        found = replace(found, artifact_bytes=artifact_bytes(recipe))
    better = None
    if card is not None and found.peak_bytes > card.bytes:
        better = fit(recipe, card.bytes, lambda other: forecast(other, device), found, report)
    speed = _speed(recipe, card, device)
    return Told(recipe, found, card, speed and seconds_per_step(found, speed), speed.origin if speed else "", better)


def _speed(recipe: Recipe, card: Card | None, device: str) -> Speed | None:
    """Of the card that is asked for, or of this machine's processor where the run is for that."""
    import torch

    from impasto.planning.memory import precision_on
    from impasto.planning.time import speed_here, speed_of

    precision = precision_on(recipe.train.precision, device).name
    if device == "cpu":
        return speed_here(torch.device("cpu"), precision)
    if card is None:
        return None
    if recipe.train.precision == "auto" and precision not in card.tflops:
        precision = "fp16"  # which is what "auto" is on a card without bf16
    return speed_of(card, precision)


def document(told: Told) -> dict[str, Any]:
    """The forecast for machines."""
    found, card, better = told.forecast, told.card, told.better
    return {
        "peak_bytes": found.peak_bytes, "parts": dict(found.parts), "at": found.moment, "moments": dict(found.moments),
        "allocated_bytes": found.allocated, "artifact_bytes": found.artifact_bytes, "flops": dict(found.flops),
        "traffic_bytes": found.traffic, "seconds_per_step": told.seconds,
        "fits": None if card is None else found.peak_bytes <= card.bytes,
        "card_bytes": None if card is None else card.bytes,
        "changes": [{"settings": dict(one.change.settings), "costs": one.change.costs, "before_bytes": one.before,
                     "after_bytes": one.after} for one in better.made] if better else [],
        "fits_changed": None if better is None else better.fits,
        "changed_peak_bytes": None if better is None else better.forecast.peak_bytes,
        "remarks": list(found.remarks)}


def show(told: Told) -> None:
    """Squares of one GiB, the parts in figures, and what there is to say of them."""
    from impasto.planning.picture import show as shown
    from impasto.planning.picture import squares

    found, card, better = told.forecast, told.card, told.better
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    shown(squares(_columns(told), shutil.get_terminal_size().columns, ascii_only=plain), sys.stdout)
    print(f"\nat its peak  {size(found.peak_bytes)} ({found.moment})")
    print(f"leaves       {size(found.artifact_bytes)}")
    if told.seconds is not None:
        from impasto.planning.time import about

        steps = told.recipe.train.known_steps
        whole = f", {about(told.seconds * steps)} for {steps} steps" if steps else ""
        print(f"takes        about {about(told.seconds)} a step{whole} ({told.origin})")
    if card is None:
        return
    print(verdict(found, card))
    if better is None:
        return
    for one in better.made:
        print(f"  {shlex.join(one.change.overrides)}  {size(one.before)} -> {size(one.after)}: {one.change.costs}")
    print(f"with {'these changes' if len(better.made) > 1 else 'this change'} it fits, in "
          f"{size(better.forecast.peak_bytes)}; --apply FILE writes the recipe" if better.fits else
          f"no change makes it fit: the smallest card that would do has {-(-better.forecast.peak_bytes // 2**30)} GiB")


def verdict(found: Forecast, card: Card) -> str:
    """Whether it fits on a card, in a line."""
    if found.peak_bytes <= card.bytes:
        return f"fits on {card.name}, with {size(card.bytes - found.peak_bytes)} to spare"
    weights = found.weight_bytes
    if weights > card.bytes:
        return f"does not fit on {card.name}: the weights alone are {size(weights)}"
    return f"does not fit on {card.name}: {size(found.peak_bytes - card.bytes)} are lacking"


def _columns(told: Told) -> list[Any]:
    from impasto.planning.picture import Column

    columns = [Column("as it is", told.forecast.parts, told.card)]
    if told.better is not None and told.better.made:
        columns.append(Column("changed", told.better.forecast.parts, told.card))
    return columns


def _write(told: Told, path: Path) -> None:
    """The recipe that fits. `UserError` if there is none."""
    import tomli_w

    from impasto.training.kept_recipe import without_none

    if told.better is not None and not told.better.fits:
        raise UserError("no change makes this run fit, so there is no recipe to write", where=path,
                        fix="take a card with more memory, or a smaller base")
    recipe = told.recipe if told.better is None else told.better.recipe
    with atomic_write(path) as file:
        tomli_w.dump(without_none(recipe.model_dump(mode="json", exclude_unset=True)), file)
