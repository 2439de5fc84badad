"""`impasto reproduce`: the recipe that made an artifact, and what differs here and now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from impasto.cli.console import emit
from impasto.cli.options import Force, Json, refuse_existing


def reproduce(
    artifact: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter or a base that impasto train made.")],
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="SECTION.KEY=VALUE", help="Where base and pictures are now: base.path=… data.folder=…")] = None,
    out: Annotated[Path | None, typer.Option(
        "-o", "--out", metavar="FILE", help="Write the recipe there; then impasto train FILE makes it again.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The recipe that made a file, and what differs now.

    It is rebuilt from the file's metadata, and compared with what is here: base, pictures, versions.
    """
    import tomli_w

    from impasto.core.files import atomic_write
    from impasto.training.kept_recipe import without_none
    from impasto.training.reproduce import reproduce as rebuild

    found = rebuild(artifact, settings or [])
    plain = without_none(found.recipe.plain())
    if out is not None:
        refuse_existing([out], force)
        with atomic_write(out) as file:
            tomli_w.dump(plain, file)
    if as_json:
        emit({"recipe": found.recipe.plain(), "step": found.step, "differs": found.differs, "unknown": found.unknown})
        return
    if out is None:
        print(tomli_w.dumps(plain))
    for line in found.differs:
        print(f"differs: {line}")
    for line in found.unknown:
        print(f"not compared: {line}")
    if not found.differs and not found.unknown:
        print("nothing differs: the same command makes the same file")
