"""Which pictures are held out to validate with: a function of the seed and of what is in them.

Contents are put in an order by a hash of (seed, content), and the first ones are held out: another picture in the
folder changes at most one of them. A copy of a held-out picture would teach what it is to test; it is held out too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from impasto.core.errors import UserError
from impasto.core.rng import seed_for
from impasto.data.options import ValidationOptions

if TYPE_CHECKING:
    from impasto.data.items import Item

#: where a recipe does not say: the share of different pictures, of at least so many, and at most so many are held out
SHARE, FEWEST, MOST = 0.1, 8, 16


def how_many(different: int, fraction: float | None) -> int:
    """How many of so many different pictures are held out."""
    if fraction is None:
        return min(max(1, int(SHARE * different)), MOST) if different >= FEWEST else 0
    return max(1, round(fraction * different)) if fraction else 0


def beyond(pictures: int, options: ValidationOptions | None) -> int:
    """How many of the drawn world's pictures, which has ever more, are drawn on top to be held out."""
    return 0 if options is None else how_many(pictures, options.fraction)


def divide(items: Sequence[Item], own: Sequence[Item] | None, options: ValidationOptions,
           seed: int) -> tuple[list[Item], list[Item], list[str]]:
    """A folder's pictures to learn from, those that are held out, and lines for the user; both in their order.

    `own` are those of `options.folder`, if it is given. Raises `UserError` if nothing would be left to learn from.
    """
    contents = {item.picture.digest for item in items}
    if own is not None:
        chosen = {item.picture.digest for item in own}
    else:
        turn = sorted(contents, key=lambda digest: (seed_for(seed, "held out", digest), digest))
        chosen = _first(turn, how_many(len(contents), options.fraction), items)
    kept = [item for item in items if item.picture.digest not in chosen]
    out = [replace(item, weight=1.0) for item in items if item.picture.digest in chosen]
    if empty := sorted({item.handling.number for item in out} - {item.handling.number for item in kept}):
        of = f" of data.{empty[0]}" if kept else ""
        raise UserError(f"every picture{of} is held out, and none is left to learn from", where="validation",
                        fix="add pictures, or do without: validation.fraction=0")
    if own is not None:
        lines = [f"pictures that are copies of held-out ones, and are not learned from: {len(out)}"] if out else []
        return kept, list(own), lines
    names = [item.picture.name for item in out]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    lines = [f"held out to validate with, and not learned from: {', '.join(names[:5])}{more}"] if out else []
    return kept, out, lines


def _first(turn: Sequence[str], count: int, items: Sequence[Item]) -> set[str]:
    """The first contents of a turn, so many; but of several sets none loses its last picture."""
    sets: dict[int, set[str]] = {}
    for item in items:
        sets.setdefault(item.handling.number, set()).add(item.picture.digest)
    if len(sets) == 1:
        return set(turn[:count])
    chosen: set[str] = set()
    for digest in turn:
        if len(chosen) == count:
            break
        if all(own - chosen - {digest} for own in sets.values()):
            chosen.add(digest)
    return chosen
