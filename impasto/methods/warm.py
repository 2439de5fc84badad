"""Warm start: a new delta begins as what an earlier run, or another program, has left."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from impasto.deltas.delta import Delta
    from impasto.deltas.lowrank import LowRank
    from impasto.families.base import Base

Terms = tuple["Delta", ...]


def read_start(start: str, base: Base, chosen: Collection[str]) -> dict[str, Terms]:
    """The terms of the adapter at "FILE" or "FILE:strength", by layer path; a chosen layer may be missing there.

    Raises `UserError` for an adapter of another family or shape, for one that holds more than changes of weights, and
    for layers that are not trained: what they hold would be lost.
    """
    from impasto.deltas.layers import shape_of
    from impasto.formats.adapters import load_adapter

    path, strength = Weighted.parse(start)
    adapter = load_adapter(path, family=base.family)
    if adapter.embeddings or adapter.hooks:
        raise UserError("holds more than changes of weights, which alone can be trained on from", where=path,
                        fix="take a file of weight deltas; new tokens begin from one by initial_file")
    if lost := [layer for layer in adapter.deltas if layer not in chosen]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"changes {lost[0]}{more}, not trained here: what was learned there would be lost", where=path,
                        fix="add them to targets, or merge the file into the base: base.adapters")
    for layer, terms in adapter.deltas.items():
        for term in terms:
            if term.shape != (wanted := shape_of(base.layer(layer))):
                raise UserError(f"changes a weight of {term.shape} at {layer}, where the base has {wanted}", where=path,
                                fix="it was made for another base")
            if strength != 1 and not term.linear:
                raise UserError(f"holds a {term.kind} at {layer}, which knows no strength", where=path,
                                fix="leave the strength out")
    return {layer: terms if strength == 1 else tuple(term.scaled(strength) for term in terms)
            for layer, terms in adapter.deltas.items()}


def take_over(delta: Delta, terms: Terms, path: str) -> None:
    """Let a new delta, made for the layer at `path`, have the dW of `terms`. Raises `UserError` where it cannot.

    A LowRank takes whatever has low-rank factors of its rank or less; what is left of its rank begins as it would
    anyway, with a dW of zero. Other kinds take their own kind of the same size.
    """
    import torch

    from impasto.deltas.lowrank import LowRank

    with torch.no_grad():
        if isinstance(delta, LowRank) and delta.mid is None:
            return _take_factors(delta, terms, path)
        same = len(terms) == 1 and terms[0].kind == delta.kind
        theirs, ours = dict(terms[0].named_parameters()) if same else {}, dict(delta.named_parameters())
        if theirs.keys() != ours.keys() or any(theirs[name].shape != own.shape for name, own in ours.items()):
            raise UserError(f"the warm start has {_told(terms)} there, which a {delta.kind} of this size cannot begin "
                            "as", where=path, fix="give this method the kind, rank and other sizes of that file")
        for name, own in ours.items():
            own.copy_(theirs[name])
        first = next(iter(ours.values()))  # dW is linear in it
        if (ratio := _scale_of(terms[0]) / _scale_of(delta)) != 1:
            first.mul_(ratio)


def _scale_of(delta: Delta) -> float:
    """What the product of the factors is multiplied by."""
    return float(getattr(delta, "scale", 1.0))


def _take_factors(delta: LowRank, terms: Terms, path: str) -> None:
    """up and down, side by side where there are several terms, at the scale of `delta`."""
    import torch

    pairs = [_factors(term, delta.scale) for term in terms]
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        raise UserError(f"the warm start has {_told(terms)} there, which has no low-rank factors", where=path,
                        fix="give this method the kind of that file")
    up, down = torch.cat([up for up, _ in known], 1), torch.cat([down for _, down in known], 0)
    if (rank := down.shape[0]) > delta.rank:
        raise UserError(f"the warm start has rank {rank} there, this method {delta.rank}", where=path,
                        fix=f"rank={rank} fits")
    delta.up[:, :rank] = up.view(*up.shape[:2], *delta.up.shape[2:])
    delta.up[:, rank:] = 0
    delta.down[:rank] = down


def _factors(term: Delta, scale: float) -> tuple[Tensor, Tensor] | None:
    """(out, r) and (r, in, …) with dW = scale · up · down: a LowRank's own where its scale is the same."""
    from impasto.deltas.lowrank import LowRank

    if not term.linear or (found := term.factors()) is None:
        return None
    if isinstance(term, LowRank) and term.up.shape[1] == found[0].shape[1] == term.rank:
        return term.up.flatten(1).float() * (term.scale / scale), found[1]
    return found[0] / scale, found[1]


def _told(terms: Terms) -> str:
    return " and ".join(f"a {term.kind}" for term in terms)
