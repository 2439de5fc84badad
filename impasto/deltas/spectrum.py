"""Singular values and vectors of a change, as many as are wanted: of a product of factors, or of a dense matrix.

A product is never multiplied out: QR of each factor, and the SVD of the small core between them. A dense matrix is
sketched (Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.4), as often as it takes: how much of the
matrix the leading vectors hold is measured after each pass, and where that does not settle, the eigenvalues of the
Gram matrix tell exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from impasto.deltas.delta import Delta

#: columns of a sketch beyond the rank that is wanted
MORE = 16
#: passes of a sketch before the Gram matrix is taken
PASSES = 12
#: of the squared error, what two more passes as the last one may gain: a quarter of a per cent of the error itself
SETTLED = 0.005
#: a matrix with so few rows or columns is not worth a sketch
SMALL = 256


class Spectrum(NamedTuple):
    """The leading singular triples of a matrix: up (m, k), values (k,) falling, in fp64, down (k, n).

    `total` is the squared Frobenius norm of the whole matrix.
    """

    up: Tensor
    values: Tensor
    down: Tensor
    total: float

    @property
    def energies(self) -> Tensor:
        """The squares of the values."""
        return self.values.square()

    def error(self, rank: int) -> float:
        """What the first `rank` triples leave, relative to the whole, in Frobenius norm."""
        if not self.total:
            return 0.0
        left = self.total - float(self.energies[:rank].sum())
        return max(left / self.total, 0.0) ** 0.5

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(m, rank) and (rank, n), balanced, whose product is the best of that rank (Eckart & Young 1936)."""
        root = self.values[:rank].sqrt().to(self.up)
        return self.up[:, :rank] * root, root[:, None] * self.down[:rank]


@torch.no_grad()
def of_delta(delta: Delta, W: Tensor | None = None, rank: int | None = None) -> Spectrum:
    """A change's spectrum, its kernel flattened beside its inputs; by its factors where these are smaller than it.

    `rank`: as many as are wanted of a dense matrix; None for all. Kinds that depend on the layer's weight need W.
    """
    factors = delta.factors() if delta.linear else None
    if factors is not None:
        up, down = factors[0], factors[1].flatten(1)
        if up.shape[1] < min(up.shape[0], down.shape[1]):
            return of_product(up, down)
    return of_matrix(delta.weight(W).flatten(1), rank)


@torch.no_grad()
def of_product(up: Tensor, down: Tensor) -> Spectrum:
    """All of up · down, (m, r) and (r, n) with r ≤ m, n: by their QR decompositions, exactly."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    core = torch.linalg.svd(upper.double() @ lower.T.double(), full_matrices=False)
    return Spectrum(left @ core.U.to(up), core.S, (right @ core.Vh.T.to(up)).T, float(core.S.square().sum()))


@torch.no_grad()
def of_matrix(matrix: Tensor, rank: int | None = None) -> Spectrum:
    """The first `rank` triples of (m, n), or all of them. With a rank, the error that they leave is within half a
    per cent of the least possible; without, they are as exact as the matrix's type."""
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2)
    least = min(matrix.shape)
    if rank is None or least <= SMALL or 4 * (rank + MORE) > least or not total:
        found = _by_gram(matrix, total, rank)
    else:
        found = _sketched(matrix, total, rank) or _by_gram(matrix, total, rank)
    return _measured(matrix, found)


def _measured(matrix: Tensor, found: Spectrum) -> Spectrum:
    """The same, where hardly anything is left with that left measured by itself: what is left of the sums of squares,
    whose last digits are rounded, is told right to a thousandth or so."""
    kept = len(found.values)
    if not found.total or found.error(kept) > 3e-3:
        return found
    up, down = found.factors(kept)
    left = float(torch.linalg.vector_norm(matrix - up @ down, dtype=torch.float64) ** 2)
    return found._replace(total=float(found.energies.sum()) + left)


def _sketched(matrix: Tensor, total: float, rank: int) -> Spectrum | None:
    """By subspace iteration from random vectors, until what more passes would gain is little beside the error.

    None if that does not come about. The gains of the passes fall, on flat spectra by a third or so each time; that the
    last one counts twice has kept the error within 1.0031 of the least on matrices of all kinds (a test has some).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    draw = torch.Generator().manual_seed(0)  # the same sketch of the same matrix, always
    start = torch.randn(wide.shape[1], rank + MORE, generator=draw).to(wide)
    basis, held = torch.linalg.qr(wide @ start).Q, 0.0
    for number in range(PASSES):
        across = wide.T @ basis
        values, turn = torch.linalg.eigh((across.T @ across).double())
        now = float(values[-rank:].clamp(min=0).sum())
        gain, held = now - held, now
        left = max(total - held, 0.0)
        if number and 2 * gain <= SETTLED * left or left <= 1e-12 * total:  # the first has gained all that it holds
            return _assembled(matrix, basis, across, values, turn, rank, total)
        basis = torch.linalg.qr(wide @ across).Q
    return None


def _assembled(matrix: Tensor, basis: Tensor, across: Tensor, values: Tensor, turn: Tensor, rank: int, total: float
               ) -> Spectrum:
    """Triples out of a basis of the shorter side, basisᵀ · matrix, and the eigenvectors of the latter's Gram matrix."""
    order = values.argsort(descending=True)[:rank]
    values, turn = values[order].clamp(min=0).sqrt(), turn[:, order].to(basis)
    one = basis @ turn
    other = (across @ turn) / values.clamp(min=torch.finfo(torch.float32).tiny).to(basis)
    return Spectrum(one, values, other.T, total) if matrix.shape[0] <= matrix.shape[1] else Spectrum(
        other, values, one.T, total)


def _by_gram(matrix: Tensor, total: float, rank: int | None) -> Spectrum:
    """By the eigenvalues of the shorter side's Gram matrix, in fp64: an eighth of an SVD's time."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh((wide @ wide.T).double() if wide.dtype == torch.float32 else wide @ wide.T)
    basis = vectors.to(wide)
    across = wide.T @ basis
    kept = len(values) if rank is None else min(rank, len(values))
    return _assembled(matrix, basis, across, across.double().square().sum(0),
                      torch.eye(len(values), dtype=torch.float64), kept, total)
