"""Between a layer's deltas and the named parts of them that files hold, whatever a format calls those.

A part is called "kind.name", the kind as in the registry of deltas and the name as its `tensors()` has it; beside them
stand "alpha" and, for DoRA, "magnitude". What files hold one of for each layer, a sum of deltas is brought to here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas import DELTAS
from impasto.deltas.delta import Delta
from impasto.deltas.told import inner_of, is_plain_lora

#: parts that only products of factors have, and that have to be there in one of the forms that are listed
FORMS = {
    "lora": (("up", "down"), ("up", "down", "mid")),
    "loha": (("w1_a", "w1_b", "w2_a", "w2_b"), ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "lokr": (("w1", "w2"), ("w1_a", "w1_b", "w2"), ("w1", "w2_a", "w2_b"), ("w1_a", "w1_b", "w2_a", "w2_b"),
             ("w1", "w2_a", "w2_b", "t2"), ("w1_a", "w1_b", "w2_a", "w2_b", "t2")),
}

#: how people call a kind, with its article
TITLES = {"lora": "a LoRA", "loha": "a LoHa", "lokr": "a LoKr", "dense": "a full difference", "dora": "a DoRA"}


#: elements of a weight: twice those of T5-XXL's table, the largest of them all. Small factors may multiply to any size
LARGEST = 2**28


#: a layer's parts by name
Parts = dict[str, Tensor]


class Held(NamedTuple):
    """What a file can hold of one layer: one change of its weight, and one of its bias."""

    change: Delta | None
    bias: Tensor | None


# --- out of a file's tensors -------------------------------------------------------------------------------


def deltas_of(layer: str, parts: Mapping[str, Tensor], where: object, kernel: Sequence[int] = ()
              ) -> tuple[Delta, ...]:
    """The deltas that the parts of one layer make: one of its weight, and one of its bias where there is one beside it.

    `kernel`: that of the layer, where it is known; some factors hold it flat. Raises `UserError` for a part that is
    missing, misshapen, or of another kind than the others.
    """
    kinds = {part.partition(".")[0] for part in parts if "." in part and part != "dense.bias"}
    if len(kinds) > 1:
        raise UserError(f"{layer} has parts of {' and of '.join(sorted(TITLES[kind] for kind in kinds))}", where=where,
                        fix="a file holds one kind of change of a layer")
    if not kinds:
        if "dense.bias" not in parts or len(parts) > 1:
            alone = next(part for part in parts if part != "dense.bias")
            raise UserError(f"{layer} has {_article(alone)} and no factors that it would belong to", where=where)
        return (_full(layer, None, parts["dense.bias"], where),)
    (kind,) = kinds
    bias = parts.get("dense.bias")
    own = {part.partition(".")[2]: tensor for part, tensor in parts.items() if part.startswith(kind + ".")}
    alpha = _number(layer, parts["alpha"], where) if "alpha" in parts else None
    magnitude = parts.get("magnitude")
    if kind == "dense":
        own.pop("bias", None)
        change = _full(layer, own["weight"], bias if magnitude is None else None, where)
        bias = None if magnitude is None else bias
    else:
        change = _product(layer, kind, own, alpha, tuple(kernel), where)
        if math.prod(change.shape) > LARGEST:
            raise UserError(f"{layer} would change a weight of {change.shape}, which no network has", where=where,
                            fix="the file is damaged, or made to fill the memory")
    if magnitude is not None:
        if len(change.shape) < 2:
            raise UserError(f"{layer} has a DoRA magnitude beside a change of shape {change.shape}", where=where)
        change = DELTAS.get("dora")(change, _oriented(layer, magnitude, change.shape, where))
    return (change,) if bias is None else (change, _full(layer, None, bias, where))


def _article(part: str) -> str:
    return f"{'an' if part[0] in 'aeiou' else 'a'} {part}"


def _number(layer: str, alpha: Tensor, where: object) -> float:
    if alpha.numel() != 1:
        raise UserError(f"{layer} has an alpha of shape {tuple(alpha.shape)}, not a single number", where=where)
    return float(alpha)


def _full(layer: str, weight: Tensor | None, bias: Tensor | None, where: object) -> Delta:
    """A full difference out of a file."""
    if any(tensor is not None and (tensor.numel() == 0 or tensor.ndim == 0) for tensor in (weight, bias)):
        raise UserError(f"{layer} has an empty difference, or a single number for one", where=where)
    try:
        return DELTAS.get("dense").from_weight(weight, bias)
    except (UserError, IndexError):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (weight, bias) if tensor is not None)
        raise UserError(f"{layer} has differences of weight and bias that do not fit together: {shapes}",
                        where=where) from None


def _product(layer: str, kind: str, own: dict[str, Tensor], alpha: float | None, kernel: tuple[int, ...],
             where: object) -> Delta:
    """A change that is a product of factors."""
    _check_form(layer, kind, own, where)
    if empty := next((name for name, tensor in own.items() if tensor.numel() == 0), None):
        raise UserError(f"{layer} has an empty {empty}", where=where)
    try:
        return MAKERS[kind](own, alpha, kernel)
    except (UserError, IndexError, RuntimeError):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in own.items())
        raise UserError(f"{layer} has factors that do not fit together: {shapes}", where=where) from None


def _check_form(layer: str, kind: str, own: Mapping[str, Tensor], where: object) -> None:
    """Say what is missing to the nearest form that the kind has."""
    if own.keys() in [set(form) for form in FORMS[kind]]:
        return
    nearest = min(FORMS[kind], key=lambda form: (len(set(form) ^ own.keys()), -len(form)))
    if missing := [name for name in nearest if name not in own]:
        raise UserError(f"{layer} lacks its {missing[0]} factor", where=where)
    surplus = sorted(own.keys() - set(nearest))
    raise UserError(f"{layer} has {surplus[0]} beside {', '.join(nearest)}", where=where)


def _lora(own: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, ...]) -> Delta:
    up, down, mid = own["up"], own["down"], own.get("mid")
    if up.ndim < 2 or down.ndim < 2:
        raise UserError("a factor is no matrix")
    pointwise = len(kernel) + 2 if math.prod(kernel) == 1 else 0
    dimensions = max(up.ndim, down.ndim, pointwise, 0 if mid is None else mid.ndim)
    # 1×1 convolutions are found as matrices, the other way round, and half and half
    up, down = (t[(..., *(None for _ in range(dimensions - t.ndim)))] for t in (up, down))
    if any(size != 1 for size in up.shape[2:]):
        raise UserError("up has a kernel")
    if mid is None:
        return DELTAS.get("lora").from_factors(up, down, alpha)
    if mid.shape[:2] != (up.shape[1], down.shape[0]) or any(size != 1 for size in down.shape[2:]):
        raise UserError("mid is of other ranks")
    return DELTAS.get("lora").from_factors(up, down, alpha, mid)


def _loha(own: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, ...]) -> Delta:
    a, b = own["w1_a"], own["w1_b"]
    if any(own[name].ndim != 2 for name in ("w1_a", "w1_b", "w2_a", "w2_b")):
        raise UserError("a factor is no matrix")
    if "t1" in own:
        shape = (a.shape[1], b.shape[1], *own["t1"].shape[2:])
    else:
        shape = (a.shape[0], *_unflat(b.shape[1], kernel))
    factors = [own[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
    return DELTAS.get("loha").from_factors(shape, *factors, alpha, t1=own.get("t1"), t2=own.get("t2"))


def _lokr(own: dict[str, Tensor], alpha: float | None, kernel: tuple[int, ...]) -> Delta:
    if any(tensor.ndim != 2 for name, tensor in own.items() if name not in ("w2", "t2", "w2_b")):
        raise UserError("a factor is no matrix")
    first = (own["w1"].shape[0], own["w1"].shape[1]) if "w1" in own else (own["w1_a"].shape[0], own["w1_b"].shape[1])
    if "w2" in own:
        if own["w2"].ndim == 2 and math.prod(kernel) == 1:
            own = own | {"w2": own["w2"][(..., *(None for _ in kernel))]}
        second: tuple[int, ...] = tuple(own["w2"].shape)
    elif "t2" in own:
        second = (own["w2_a"].shape[1], own["w2_b"].shape[1], *own["t2"].shape[2:])
    else:
        own = own | {"w2_b": own["w2_b"].flatten(1)}
        second = (own["w2_a"].shape[0], *_unflat(own["w2_b"].shape[1], kernel))
    shape = (first[0] * second[0], first[1] * second[1], *second[2:])
    whole = "w1" in own and "w2" in own  # then alpha means nothing
    return DELTAS.get("lokr").from_factors(shape, **own, alpha=None if whole else alpha)


MAKERS: dict[str, Callable[[dict[str, Tensor], float | None, tuple[int, ...]], Delta]] = {
    "lora": _lora, "loha": _loha, "lokr": _lokr}


def _unflat(inputs: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """in · kernel as (in, *kernel), where the kernel is known and divides it."""
    taps = math.prod(kernel)
    return (inputs // taps, *kernel) if inputs % taps == 0 else (inputs,)


def _oriented(layer: str, magnitude: Tensor, shape: tuple[int, ...], where: object) -> Tensor:
    """A DoRA's magnitude as (out, 1, …) or (1, in, …). By itself (n), it is of the outputs."""
    ones = (1,) * (len(shape) - 1)
    if magnitude.ndim > 0 and magnitude.numel() == shape[0] and (magnitude.ndim == 1 or magnitude.shape[0] == shape[0]):
        return magnitude.reshape(shape[0], *ones)
    if magnitude.ndim > 1 and magnitude.numel() == magnitude.shape[1] == shape[1]:
        return magnitude.reshape(1, shape[1], *ones[1:])
    raise UserError(f"{layer} has a DoRA magnitude of shape {tuple(magnitude.shape)}, and changes a weight of {shape}",
                    where=where)


# --- into a file's tensors ---------------------------------------------------------------------------------


def held(layer: str, terms: Sequence[Delta], where: object) -> Held:
    """The sum of a layer's deltas as one of its weight and one of its bias, exact up to rounding.

    LoRAs are joined along the rank; with a full difference among them the sum is one; others by their exact low-rank
    factors, while these are not larger than the matrix. Raises `UserError` for NaN, and for a sum that has no such
    form, saying what to do.
    """
    biases, weights = list[Tensor](), list[Delta]()
    for term in terms:
        if not all(torch.isfinite(tensor).all() for tensor in term.tensors().values()):
            raise UserError(f"{layer} holds NaN or infinity", where=where, fix="the training has diverged")
        if (bias := term.bias()) is not None:
            biases.append(bias.detach().float().cpu())
        if term.kind != "dense" or "weight" in term.tensors():
            weights.append(term)
    bias = sum(biases[1:], start=biases[0]) if biases else None
    return Held(_single(layer, weights, where), bias)


def _single(layer: str, terms: list[Delta], where: object) -> Delta | None:
    """One delta for all changes of a layer's weight."""
    if len(terms) < 2:
        return terms[0] if terms else None
    kinds = sorted({TITLES.get(term.kind, term.kind) for term in terms})
    if not all(term.linear for term in terms):
        raise UserError(f"{layer} is changed by {' and '.join(kinds)}, whose sum depends on the base's weight",
                        where=where, fix="merge them into the base one after the other")
    if all(map(is_plain_lora, terms)):
        return _side_by_side(terms)
    if any(term.kind == "dense" for term in terms):
        weights = [term.weight().detach().cpu() for term in terms]
        return DELTAS.get("dense").from_weight(sum(weights[1:], start=weights[0]))
    if (joined := _by_factors(terms)) is not None:
        return joined
    raise UserError(f"{layer} is the sum of {' and '.join(kinds)}, and a file holds one kind of change of a layer",
                    where=where, fix="resize the sum to one low rank, or merge both into a base")


def _side_by_side(terms: list[Delta]) -> Delta:
    """LoRAs along the rank: the factors as they are, where all have the same scale."""
    parts = [term.tensors() for term in terms]
    ups, downs = ([part[name].detach().float().cpu() for part in parts] for name in ("up", "down"))
    scales = [float(part["alpha"]) / down.shape[0] for part, down in zip(parts, downs, strict=True)]
    scale = scales[0] if len(set(scales)) == 1 else 1.0
    if len(set(scales)) > 1:  # differing scales have no common alpha
        ups = [up * own for up, own in zip(ups, scales, strict=True)]
    down = torch.cat(downs, 0)
    return DELTAS.get("lora").from_factors(torch.cat(ups, 1), down, scale * down.shape[0])


def _by_factors(terms: Sequence[Delta]) -> Delta | None:
    """A LoRA of exact factors, if all terms have them and they are not larger than the dense matrix."""
    factors = []
    for term in terms:
        if (found := term.factors()) is None:
            return None
        factors.append([factor.detach().float().cpu() for factor in found])
    up, down = torch.cat([up for up, _ in factors], 1), torch.cat([down for _, down in factors], 0)
    if up.numel() + down.numel() > up.shape[0] * down[0].numel():
        return None
    return DELTAS.get("lora").from_factors(up, down, float(down.shape[0]))


def as_lora(change: Delta) -> Delta | None:
    """The same change as a LoRA of two factors, where it has them and they are not larger than the dense matrix."""
    if is_plain_lora(change):
        return change
    return _by_factors([change]) if change.linear else None


def parts_of(layer: str, content: Held, where: object) -> Parts:
    """Named parts, in fp32 on the CPU, of what a file holds of a layer; alpha is there for all products.

    A change of no strength has a factor of zeros: some programs take alpha = 0 for "no alpha", that is, for full
    strength. Raises `UserError` for a DoRA of another strength than 1.
    """
    parts: Parts = {}
    if (change := content.change) is not None:
        if change.kind == "dora":
            around = change.tensors()
            if float(around["strength"]) != 1.0:
                strength = f"{float(around['strength']):g}"
                raise UserError(f"{layer} holds a DoRA at strength {strength}, and files hold it at 1", where=where,
                                fix="give the strength where it is used, or merge it into a base")
            parts["magnitude"] = around["magnitude"].detach().float().cpu()
        inner = inner_of(change)
        tensors, kind = inner.tensors(), inner.kind
        for name, tensor in tensors.items():
            if name not in ("shape", "alpha", "bias"):
                parts[f"{kind}.{name}"] = tensor.detach().float().cpu()
        if kind in FORMS:
            alpha, rank = float(tensors["alpha"]), rank_in(parts)
            if alpha == 0 and rank:
                first = next(name for name in (f"{kind}.{FIRST[kind]}", "lokr.w1_a") if name in parts)
                parts[first], alpha = torch.zeros_like(parts[first]), float(rank)
            parts["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    if content.bias is not None:
        parts["dense.bias"] = content.bias
    return parts


#: the factor that says all by being zero
FIRST = {"lora": "up", "loha": "w1_a", "lokr": "w1"}


def rank_in(parts: Mapping[str, Tensor]) -> int:
    """What alpha is divided by in a layer's change; 0 where alpha has no meaning."""
    ranked = ("lora.down", "loha.w1_b", "lokr.w2_b", "lokr.w1_b")
    return next((parts[part].shape[0] for part in ranked if part in parts), 0)
