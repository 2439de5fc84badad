"""`impasto dataset …`: pictures and captions, before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from impasto.cli.app import SETTINGS, Verb, Verbs
from impasto.cli.console import RichReporter, emit
from impasto.cli.options import Force, Json, refuse_existing
from impasto.core.errors import UserError

if TYPE_CHECKING:
    from impasto.data.options import DataOptions

dataset = typer.Typer(cls=Verbs, add_completion=False, rich_markup_mode=None, no_args_is_help=True,
                      context_settings=SETTINGS, subcommand_metavar="VERB [ARGUMENTS]...")


@dataset.callback()
def verbs() -> None:
    """Look at pictures and captions before a run."""


@dataset.command("check", cls=Verb, context_settings=SETTINGS)
def check(
    source: Annotated[str, typer.Argument(
        metavar="RECIPE|FOLDER|SHARDS", help="A recipe, whose [data] and [prior] are looked at, a folder of pictures, "
        "or shards: \"shard-{0000..0099}.tar\", also over HTTP.")],
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="SECTION.KEY=VALUE", help="As in impasto train: data.resolution=768 "
        "\"data.caption=a photo of sks dog\" train.batch_size=4")] = None,
    html: Annotated[Path | None, typer.Option(
        "--html", metavar="FILE", help="Write a page too, with all crops as the model will see them.")] = None,
    no_near_duplicates: Annotated[bool, typer.Option(
        "--no-near-duplicates", help="Look for exact copies only.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Account for every picture: used, how it is cut, or why not.

    No model is loaded. The exit code is 1 if a run would refuse to begin.
    """
    from impasto.training.recipe import load_data_sections

    recipe = load_data_sections(source, settings or [])
    if recipe.data is None:
        raise UserError("[data] is missing", where=source, fix="say which pictures: data.folder=…")
    if html is not None:
        refuse_existing([html], force)
    if all(one.source == "world" for one in recipe.data.sets):
        _world(recipe.data.sets, as_json)
        return
    if recipe.data.sets[0].source == "shards":  # the only set
        from impasto.cli.dataset_shards import check_and_print

        if not check_and_print(recipe.data.sets[0], recipe.prior, recipe.train.batch_size,
                               near=not no_near_duplicates, page=html, as_json=as_json):
            raise typer.Exit(1)
        return
    from impasto.cli.dataset_text import lines
    from impasto.data.check import check_all, plain, verdict
    from impasto.data.inventory import take_inventories

    report = RichReporter()
    checked = check_all(take_inventories(recipe.data, recipe.prior, recipe.train.batch_size, report),
                        near=not no_near_duplicates)
    found = verdict(checked)
    if html is not None:
        from impasto.evaluation.dataset_page import write_page
        from impasto.evaluation.dataset_parts import folder_part

        write_page([folder_part(each) for each in checked], found, html, report)
    if as_json:
        told: dict[str, Any] = {"fit": found.fit, "verdict": found.line, "advice": found.advice,
                                "page": None if html is None else str(html), "folders": [plain(c) for c in checked]}
        emit(told)
    else:
        print("\n".join(lines(checked, found, html)))
    if not found.fit:
        raise typer.Exit(1)


def _world(sets: Sequence[DataOptions], as_json: bool) -> None:
    count = sum(one.pictures or 0 for one in sets)
    line = f"fit to train: {count:,} pictures of the drawn world, each made when it is needed"
    if as_json:
        emit({"fit": True, "verdict": line, "advice": [], "page": None, "folders": []})
    else:
        print(line)
