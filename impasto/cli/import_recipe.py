"""`impasto import-recipe`: another trainer's settings as a recipe, with an account of every key."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from impasto.cli.console import emit
from impasto.cli.drawings import columns, safe, short
from impasto.cli.options import Force, Json, refuse_existing
from impasto.core.files import atomic_write

if TYPE_CHECKING:
    from impasto.training.foreign.engine import Imported, Left

#: lines are not longer than this, however wide the terminal is
WIDE = 100


def import_recipe(
    files: Annotated[list[Path], typer.Argument(
        metavar="FILE", help="kohya's config, dataset config or command line (in a text file), or OneTrainer's "
        "config; with the files that it names, if they are not where it says.")],
    out: Annotated[Path | None, typer.Option(
        "-o", "--out", metavar="FILE", help="Where the recipe goes; default: it is printed.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn another trainer's settings into a recipe, and say what could not be carried over."""
    from impasto.training.foreign import import_recipe as read

    if out is not None:
        refuse_existing([out], force)
    found = read(files)
    if out is not None:
        with atomic_write(out) as file:
            file.write(found.toml().encode())
    if as_json:
        emit(found.plain() | {"file": out and str(out)})
    else:
        account = "\n".join(lines(found, min(WIDE, max(columns(), 60))))
        if out is None:
            print(found.toml())
        print(account, file=sys.stderr if out is None else sys.stdout)
        if out is not None:
            print(f"\n{out}")


def lines(found: Imported, width: int) -> Iterator[str]:
    """The account for people: what was carried over, what was not and why, what is to be done."""
    given = [each for each in found.carried if each.key]
    theirs = [each for each in found.carried if not each.key and each.to not in found.to_fill_in]
    yield f"{found.trainer}: {', '.join(map(safe, found.files))}"
    yield from _section(f"carried over ({len(given)})", (
        (f"{each.key} = {_value(each.value)}  ->  {each.to} = {_value(each.becomes)}", each.why, "")
        for each in given), width)
    yield from _section(f"not in the file, but so in {found.trainer} ({len(theirs)})", (
        (f"{each.to} = {_value(each.becomes)}", each.why, "") for each in theirs), width)
    lost = [*found.lost, *found.unknown]
    yield from _section(f"not carried over ({len(lost)})", (
        (f"{each.key} = {_value(each.value)}" if each.value is not None else each.key, each.why,
         f"here: {each.here} = {_value(each.instead)}" if each.here and each.instead is not None else "")
        for each in lost), width)
    yield from _section(f"not needed ({len(found.needless)})", _by_reason(found.needless), width)
    if found.without_effect:
        told = f"without effect ({len(found.without_effect)}): {short(', '.join(found.without_effect), 4 * width)}"
        yield from ["", *_wrapped(told, "", width)]
    yield from _section("to fill in", ((key, why, "") for key, why in found.to_fill_in.items()), width)
    yield from _section("note", ((note, "", "") for note in found.notes), width)


def _section(title: str, entries: Iterable[tuple[str, str, str]], width: int) -> Iterator[str]:
    """A heading, and below it an entry a line, with what is told of it below that; nothing without entries."""
    for number, (what, *told) in enumerate(entries):
        if number == 0:
            yield ""
            yield title
        yield from _wrapped(safe(what), "  ", width)
        for line in filter(None, told):
            yield from _wrapped(safe(line), "      ", width)


def _by_reason(left: Iterable[Left]) -> Iterator[tuple[str, str, str]]:
    """Keys that share a reason together; those of one long table as one."""
    reasons: dict[str, list[str]] = {}
    for each in left:
        parent, dot, _ = each.key.partition(".")
        names = reasons.setdefault(each.why, [])
        name = f"{parent}.*" if dot and sum(other.key.startswith(f"{parent}.") for other in left) > 6 else each.key
        if name not in names:
            names.append(name)
    yield from ((", ".join(names), why, "") for why, names in reasons.items())


def _wrapped(words: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _value(value: Any) -> str:
    """A value of theirs or ours, in short."""
    shown = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    return short(", ".join(map(str, shown)) if isinstance(shown, list) else str(shown), 120)
