"""Which pictures are held out to validate with: a function of the seed and of what is in them.

Contents are put in an order by a hash of (seed, content), and the first ones are held out: another picture in the
folder changes at most one of them. A copy of a held-out picture would teach what it is to test; it is held out too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from impasto.core.errors import UserError
from impasto.core.rng import seed_for
from impasto.data.many import Many
from impasto.data.options import ValidationOptions

if TYPE_CHECKING:
    from impasto.data.source import Item

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
           seed: int) -> tuple[Sequence[Item], Sequence[Item], list[str]]:
    """A folder's pictures to learn from, those that are held out, and lines for the user; both in their order.

    `own` are those of `options.folder`, if it is given. Raises `UserError` if nothing would be left to learn from.
    """
    if isinstance(items, Many):
        return items.divided(own, options, seed)
    contents = {item.picture.digest for item in items}
    if own is not None:
        chosen = {item.picture.digest for item in own}
    else:
        turn = sorted(contents, key=lambda digest: (seed_for(seed, "held out", digest), digest))
        chosen = set(turn[:how_many(len(contents), options.fraction)])
    kept = [item for item in items if item.picture.digest not in chosen]
    out = [item for item in items if item.picture.digest in chosen]
    lines = told_of(len(kept), [item.picture.name for item in out[:5]], len(out), own is not None)
    return kept, out if own is None else list(own), lines


def told_of(kept: int, first: Sequence[str], out: int, apart: bool) -> list[str]:
    """Lines for the user on `out` pictures that are not learned from, of which the `first` have these names; `apart`:
    since they are copies of held-out ones that lie in a folder of their own. Raises `UserError` if none is `kept`.
    """
    if not kept:
        raise UserError("every picture is held out, and none is left to learn from", where="validation",
                        fix="add pictures, or do without: validation.fraction=0")
    if not out:
        return []
    if apart:
        return [f"pictures that are copies of held-out ones, and are not learned from: {out}"]
    more = f" and {out - len(first)} more" if out > len(first) else ""
    return [f"held out to validate with, and not learned from: {', '.join(first)}{more}"]
