"""Which pictures are held out to validate with: a function of the seed and of what is in them.

Contents are put in an order by a hash of (seed, content), and the first ones are held out: another picture in the
folder changes at most one of them. A copy of a held-out picture would teach what it is to test; it is held out too.
"""

from __future__ import annotations

from collections.abc import Sequence

from impasto.core.errors import UserError
from impasto.core.rng import seed_for
from impasto.data.items import Item, unweighed
from impasto.data.many import Many
from impasto.data.options import ValidationOptions

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
        chosen = _first(turn, how_many(len(contents), options.fraction), items)
    kept = [item for item in items if item.picture.digest not in chosen]
    out = [unweighed(item) for item in items if item.picture.digest in chosen]
    empty = sorted({item.handling.number for item in out} - {item.handling.number for item in kept})
    if kept and empty:
        raise _none_left(f" of data.{empty[0]}")
    named = list(dict.fromkeys((item.handling.number, item.picture.name) for item in out))  # once at all resolutions
    lines = told_of(len(kept), [name for _, name in named[:5]], len(named), own is not None)
    return kept, out if own is None else [unweighed(item) for item in own], lines


def told_of(kept: int, first: Sequence[str], out: int, apart: bool) -> list[str]:
    """Lines for the user on `out` pictures that are not learned from, of which the `first` have these names; `apart`:
    since they are copies of held-out ones that lie in a folder of their own. Raises `UserError` if none is `kept`.
    """
    if not kept:
        raise _none_left()
    if not out:
        return []
    if apart:
        return [f"pictures that are copies of held-out ones, and are not learned from: {out}"]
    more = f" and {out - len(first)} more" if out > len(first) else ""
    return [f"held out to validate with, and not learned from: {', '.join(first)}{more}"]


def _none_left(of: str = "") -> UserError:
    return UserError(f"every picture{of} is held out, and none is left to learn from", where="validation",
                     fix="add pictures, or do without: validation.fraction=0")


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
