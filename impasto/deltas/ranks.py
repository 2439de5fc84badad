"""How much of each layer's spectrum is kept: a rank, a share of the whole, or as much as fits a size."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.spectrum import Spectrum

#: what a share is of, as kohya's resize_lora.py names them: the Frobenius norm, the sum of the singular values, or the
#: largest singular value, of which the smallest kept one is at least that part
Measure = Literal["fro", "cumulative", "ratio"]


@dataclass(frozen=True)
class Wanted:
    """One of the three: `rank` of every layer; `energy`, the share of each that is kept, by `measure`; `size`, bytes of
    the factors of all layers together, at `itemsize` bytes a number, shared out so that the whole error is least.

    `most`: a bound on the rank of any layer, beside `energy` or `size`.
    """

    rank: int | None = None
    energy: float | None = None
    size: int | None = None
    measure: Measure = "fro"
    itemsize: int = 2
    most: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"asks for {' and '.join(given) or 'nothing'}", where="resizing",
                            fix="say one of rank, energy and size")
        for name in ("rank", "size", "most"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"{name} is {number}", where="resizing", fix="it is 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy is {self.energy:g}", where="resizing", fix="it is a share, above 0 and up to 1")
        if self.measure not in get_args(Measure):
            raise UserError(f"there is no measure {self.measure!r}", where="resizing", fix=", ".join(get_args(Measure)))

    @property
    def known(self) -> int | None:
        """Singular triples of a layer that are enough to choose; None: all of them."""
        return self.rank if self.rank is not None else self.most


def chosen(spectra: Mapping[str, Spectrum], wanted: Wanted) -> dict[str, int]:
    """The rank of each layer, 1 or more, or 0 of one that is all zeros. Raises `UserError` for a size too small for
    rank 1."""
    most = {layer: _most(spectrum, wanted) for layer, spectrum in spectra.items()}
    if wanted.rank is not None:
        return {layer: min(wanted.rank, bound) for layer, bound in most.items()}
    if wanted.energy is not None:
        return {layer: min(_by_share(spectra[layer], wanted.energy, wanted.measure), bound)
                for layer, bound in most.items()}
    assert wanted.size is not None
    return _by_size(spectra, most, wanted.size // wanted.itemsize)


def _most(spectrum: Spectrum, wanted: Wanted) -> int:
    """Triples that are there and tell something beyond rounding."""
    values = spectrum.values
    if not len(values) or not float(values[0]):
        return 0
    there = int((values > values[0] * torch.finfo(torch.float32).eps).sum())
    return there if wanted.most is None else min(there, wanted.most)


def _by_share(spectrum: Spectrum, share: float, measure: Measure) -> int:
    values = spectrum.values
    if measure == "ratio":
        return max(1, int((values >= values[0] * share).sum()))
    if measure == "cumulative":
        return _first(values.cumsum(0) / values.sum(), share)
    return _first((spectrum.energies.cumsum(0) / spectrum.total).sqrt(), share)


def _first(shares: Tensor, wanted: float) -> int:
    """The smallest count whose share is at least the one that is wanted."""
    return min(bisect.bisect_left(shares.tolist(), wanted * (1 - 1e-12)) + 1, len(shares))


def _by_size(spectra: Mapping[str, Spectrum], most: Mapping[str, int], numbers: int) -> dict[str, int]:
    """Triples in the order of what they gain for a number, as many as there is room for.

    Within a layer each costs the same and the next gains less, so that what is taken is always a beginning; and no
    other choice of as many numbers leaves a smaller error of the whole, up to the last triple.
    """
    costs = {layer: spectrum.up.shape[0] + spectrum.down.shape[1] for layer, spectrum in spectra.items()}
    ranks = {layer: min(1, bound) for layer, bound in most.items()}
    room = numbers - sum(costs[layer] * rank for layer, rank in ranks.items())
    if room < 0:
        least = sum(costs[layer] for layer, rank in ranks.items() if rank)
        raise UserError(f"rank 1 of every layer takes {least} numbers, and the size holds {numbers}", where="resizing",
                        fix="ask for a larger size")
    gains = [(float(energy) / costs[layer], layer) for layer, spectrum in spectra.items()
             for energy in spectrum.energies[1:most[layer]]]
    for _, layer in sorted(gains, reverse=True):
        if costs[layer] <= room:
            ranks[layer] += 1
            room -= costs[layer]
    return ranks
