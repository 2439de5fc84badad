"""An adapter at lower ranks, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted, chosen
from impasto.deltas.spectrum import Spectrum, of_delta, of_matrix

#: for each layer its weight W, of a base
Weights = Callable[[str], Tensor]


@dataclass(frozen=True)
class Kept:
    """What is kept of one layer's change: its rank (0: it is no product of two factors), the share of it that is lost
    (Frobenius), and its norm."""

    rank: int
    error: float
    norm: float


def resized(adapter: Adapter, wanted: Wanted, weights: Weights | None = None,
            advance: Callable[[int], object] = lambda layers: None) -> tuple[Adapter, dict[str, Kept]]:
    """The adapter with a LoRA of a lower rank in each layer's place: the best of that rank. And what it kept.

    Sums of several deltas become one. Changes of biases and of norms, tokens and hooks stay as they are. A kind that
    depends on the base needs `weights`. `advance` is told of each layer. Raises `UserError`; so if no layer gets
    smaller.
    """
    spectra: dict[str, Spectrum] = {}
    others: dict[str, tuple[Delta, ...]] = {}
    for layer, terms in adapter.deltas.items():
        spectrum = spectrum_of(layer, terms, wanted.known, weights)
        if spectrum is not None:
            spectra[layer] = spectrum
        if kept := biases_of(terms, spectrum is not None):
            others[layer] = kept
        advance(1)
    if not spectra:
        raise UserError("changes no layer by a matrix", where="resizing", fix="there is nothing to be cut to a rank")
    if wanted.rank is not None:
        _check_lower(spectra, wanted.rank)
    return _cut(adapter, spectra, others, chosen(spectra, wanted))


def spectrum_of(layer: str, terms: Iterable[Delta], rank: int | None, weights: Weights | None) -> Spectrum | None:
    """Of the sum of a layer's terms, as many triples as `rank`, or all. None where no weight of a matrix changes."""
    terms = [term for term in terms if len(term.shape) > 1]
    if not terms:
        return None
    if not all(term.linear for term in terms) and weights is None:
        raise UserError("holds a delta that depends on the base's weight", where=layer, fix="give the base")
    W = None if weights is None or all(term.linear for term in terms) else weights(layer).float()
    total = terms[0]
    for term in terms[1:]:
        joined = total.joined(term) if total.linear and term.linear else None
        if joined is None:
            return of_matrix(sum((term.weight(W) for term in terms[1:]), start=terms[0].weight(W)).flatten(1), rank)
        total = joined
    return of_delta(total, W, rank)


def biases_of(terms: Iterable[Delta], factored: bool) -> tuple[Delta, ...]:
    """What no factors can hold: changes of norms, and of biases; with `factored` also of those that stand in the delta
    of a weight that becomes factors."""
    kept: list[Delta] = []
    for term in terms:
        if len(term.shape) < 2:
            kept.append(term)
        elif factored and (bias := term.bias()) is not None:
            kept.append(Dense.from_weight(None, bias))
    return tuple(kept)


def _check_lower(spectra: Mapping[str, Spectrum], rank: int) -> None:
    highest = max((len(spectrum.values) for spectrum in spectra.values()), default=0)
    if rank > highest:
        raise UserError(f"its ranks are {highest} at most, and {rank} is asked for", where="resizing",
                        fix="a higher rank would add zeros alone; ask for a lower one")


def _cut(adapter: Adapter, spectra: Mapping[str, Spectrum], others: Mapping[str, tuple[Delta, ...]],
         ranks: Mapping[str, int]) -> tuple[Adapter, dict[str, Kept]]:
    deltas: dict[str, tuple[Delta, ...]] = {}
    told: dict[str, Kept] = {}
    for layer, terms in adapter.deltas.items():
        own = others.get(layer, ())
        if layer in spectra:
            spectrum, rank = spectra[layer], ranks[layer]
            told[layer] = Kept(rank, spectrum.error(rank), math.sqrt(spectrum.total))
            shape = next(term.shape for term in terms if len(term.shape) > 1)
            own = (*((low_rank(spectrum, rank, shape),) if rank else ()), *own)
        if own:
            deltas[layer] = own
    return replace(adapter, deltas=deltas), told


def low_rank(spectrum: Spectrum, rank: int, shape: tuple[int, ...]) -> LowRank:
    """The first `rank` triples as a LoRA of a layer of that shape, of scale 1."""
    up, down = spectrum.factors(rank)
    return LowRank.from_factors(up.contiguous(), down.reshape(rank, *shape[1:]).contiguous(), float(rank))


def overall(told: Mapping[str, Kept]) -> float:
    """What is lost of all layers together, relative, in Frobenius norm."""
    whole = sum(kept.norm**2 for kept in told.values())
    return math.sqrt(sum((kept.error * kept.norm) ** 2 for kept in told.values()) / whole) if whole else 0.0
