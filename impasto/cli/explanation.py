"""The text of `impasto train RECIPE --explain`: a setting's value and origin on one line, why below it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from impasto.cli.console import emit
from impasto.cli.drawings import columns, safe
from impasto.training.explain import Explanation, explain

#: lines are not longer than this, however wide the terminal is
WIDE = 100


def show(recipe: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print each setting of a recipe."""
    told = explain(recipe, overrides)
    if as_json:
        emit(told.plain())
    else:
        print("\n".join(lines(told, min(WIDE, max(columns(), 60)))))


def lines(told: Explanation, width: int) -> Iterator[str]:
    """All lines, section by section; of a section that the recipe does without, what it is."""
    yield safe(str(told.path))
    for part in told.parts:
        yield ""
        yield from textwrap.wrap(f"[{part.name}] {part.about}", width, subsequent_indent="  ")
        if not part.settings:
            yield "  not in this recipe"
            continue
        names = max(len(each.key) for each in part.settings)
        for each in part.settings:
            start = f"  {each.key:<{names}}  {each.origin:<12}  "
            yield from textwrap.wrap(shown(each.value), width, initial_indent=start,
                                     subsequent_indent=" " * len(start), break_on_hyphens=False)
            yield from textwrap.wrap(each.why, width, initial_indent=" " * 6, subsequent_indent=" " * 6,
                                     break_on_hyphens=False)


def shown(value: Any) -> str:
    """A value as a recipe has it, or nearly: texts in quotes, `-` where nothing is set."""
    match value:
        case None:
            return "-"
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{safe(value)}"'
        case list():
            return f"[{', '.join(map(shown, value))}]"
        case dict():
            return f"{{{', '.join(f'{safe(key)} = {shown(each)}' for key, each in value.items())}}}"
    return str(value)
