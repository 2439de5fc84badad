"""The check before every save: what is about to be written means what the adapter means, to the rounding of its type.

It is of our own code, so what it finds is an `AssertionError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from impasto.deltas.delta import Delta
from impasto.deltas.told import inner_of, is_plain_lora


def check_meaning(meant: Mapping[str, Sequence[Delta]], saved: Mapping[str, Sequence[Delta]], dtype: torch.dtype
                  ) -> None:
    """The layers of an adapter, and what a codec reads out of the tensors that it has made of them.

    A layer may be missing on either side whose change is zero: files that hold several layers as one hold zeros for
    those that are not changed.
    """
    for layer in {**meant, **saved}:
        terms, others = meant.get(layer, ()), saved.get(layer, ())
        _check_biases(layer, terms, others, dtype)
        terms, others = _weights(terms), _weights(others)
        if not terms:  # a bias alone, or nothing: zeros are written for a norm's weight, and beside other layers
            assert not any(bool(term.weight().count_nonzero()) for term in others), layer
            continue
        if all(is_plain_lora(term) for term in (*terms, *others)):
            _check_products(layer, terms, others, dtype)
        elif not _same_tensors(terms, others, dtype):
            _check_dense(layer, terms, others, dtype)


def _weights(terms: Sequence[Delta]) -> list[Delta]:
    return [term for term in terms if term.shape]  # () changes a bias alone


def _check_biases(layer: str, terms: Sequence[Delta], others: Sequence[Delta], dtype: torch.dtype) -> None:
    """Where there is none, zeros may be written."""
    info = torch.finfo(dtype)
    meant, saved = ([bias.detach().cpu().double() for term in each if (bias := term.bias()) is not None]
                    for each in (terms, others))
    gap = sum(saved) - sum(meant)
    bound = sum(bias.abs() for bias in meant) * info.eps * 1.1 + info.tiny * info.eps
    assert bool(torch.as_tensor(abs(gap) <= bound).all()), f"the bias of {layer} would be saved wrong"


def _check_products(layer: str, terms: Sequence[Delta], others: Sequence[Delta], dtype: torch.dtype) -> None:
    """Each layer is tried on one vector x, and the difference held against what rounding each factor once can
    make of it, elementwise: scale · 2ε · |up|·|down|·|x|, and the smallest numbers of `dtype` beside that."""
    info = torch.finfo(dtype)
    x = torch.cos(torch.arange(_factors(terms[0])[1].shape[1], dtype=torch.float64))
    gap, bound = torch.zeros(terms[0].shape[0], dtype=torch.float64), 1e-30
    for term in others:
        up, down, scale = _factors(term)
        gap += scale * (up @ (down @ x))
    for term in terms:
        up, down, scale = _factors(term)
        # a codec may move the scale into the factors, and they nearer to the smallest numbers
        least = info.tiny * info.eps / min(1.0, abs(scale) or 1.0)
        gap -= scale * (up @ (down @ x))
        spread = down.abs() @ x.abs()
        rounding = 2.1 * info.eps * (up.abs() @ spread)
        bound = bound + abs(scale) * (rounding + least * (spread.sum() + up.abs().sum(1) * x.abs().sum()))
    assert (gap.abs() <= bound).all(), f"{layer} would be saved wrong, by {gap.abs().max():.3g}"


def _factors(term: Delta) -> tuple[Tensor, Tensor, float]:
    """up (out, r), down (r, in · kernel) in fp64, and the scale."""
    tensors = term.tensors()
    up, down = (tensors[name].detach().cpu().flatten(1).double() for name in ("up", "down"))
    return up, down, float(tensors["alpha"]) / down.shape[0]


def _same_tensors(terms: Sequence[Delta], others: Sequence[Delta], dtype: torch.dtype) -> bool:
    """Whether one delta is saved as it is, each of its tensors rounded once."""
    if len(terms) != 1 or len(others) != 1 or terms[0].kind != others[0].kind:
        return False
    one, other = terms[0].tensors(), others[0].tensors()
    if terms[0].kind == "dense":
        one, other = {"weight": one["weight"]}, {"weight": other["weight"]}
    return one.keys() == other.keys() and all(
        _rounded(name.removeprefix("inner."), one[name], other[name], dtype) for name in one)


def _rounded(name: str, meant: Tensor, saved: Tensor, dtype: torch.dtype) -> bool:
    meant, saved = meant.detach().cpu(), saved.detach().cpu()
    if name == "alpha":
        return bool(torch.isclose(saved.double(), meant.double(), rtol=1e-6, atol=0))
    if not meant.is_floating_point() or name == "strength":
        return torch.equal(meant, saved)
    return meant.numel() == saved.numel() and torch.equal(meant.float().to(dtype).float().reshape(saved.shape), saved)


def _check_dense(layer: str, terms: Sequence[Delta], others: Sequence[Delta], dtype: torch.dtype) -> None:
    """dW of both, in fp64, elementwise, against what moving each number of each factor by its rounding can make of it.

    Of a DoRA, its inner change and its magnitude by themselves.
    """
    if not all(term.linear for term in (*terms, *others)):
        (one,), (other,) = terms, others
        assert one.kind == other.kind == "dora", (one.kind, other.kind)
        assert _rounded("magnitude", one.tensors()["magnitude"], other.tensors()["magnitude"], dtype), layer
        check_meaning({layer: [inner_of(one)]}, {layer: [inner_of(other)]}, dtype)
        return
    info = torch.finfo(dtype)
    gap, bound = torch.zeros((), dtype=torch.float64), torch.full((), 1e-30, dtype=torch.float64)
    for term in others:
        gap = gap + _wide(term).weight().flatten(1)
    for term in terms:
        gap = gap - _wide(term).weight().flatten(1)
        size = _wide(term, torch.abs).weight().flatten(1)
        moved = _wide(term, lambda t: t.abs() * (1 + 2 * info.eps) + info.tiny)
        bound = bound + moved.weight().flatten(1) - size + 1e-6 * size
    assert (gap.abs() <= bound).all(), f"{layer} would be saved wrong, by {gap.abs().max():.3g}"


def _wide(term: Delta, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Delta:
    """The term in fp64, on the CPU, with each of its numbers changed."""
    tensors = {name: change(tensor.detach().cpu().double()) if tensor.is_floating_point() else tensor
               for name, tensor in term.tensors().items()}
    return type(term).from_tensors(tensors)
