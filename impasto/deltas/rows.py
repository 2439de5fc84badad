"""Outputs of a change: some of them by themselves, and changes below one another.

Some networks have the queries, keys and values of an attention in one layer where others have three, or the halves of a
layer's outputs the other way round. A change follows: exactly, in its own kind where that has rows to cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas import DELTAS
from impasto.deltas.delta import Delta
from impasto.deltas.told import inner_of, is_plain_lora

#: factors whose rows are the change's outputs, by kind; a LoKr's are so in blocks
OUTPUTS = {"lora": ("up",), "loha": ("w1_a", "w2_a"), "lokr": ("w1", "w1_a"), "dense": ("weight", "bias")}

Tensors = dict[str, Tensor]


# --- some of the outputs -----------------------------------------------------------------------------------


def taken(delta: Delta, chosen: Sequence[int], of: int) -> Delta:
    """The change of some of the layer's outputs: these are cut into `of` equal parts, of which the `chosen` are taken,
    in that order. No tensor is shared with `delta`, or with another part of it.

    A LoKr whose first factor cannot be cut becomes a LoRA of its exact factors, or dense where these are larger. Ranks
    that change none of the chosen outputs are left out. Raises `UserError` for a DoRA that cannot be cut.
    """
    if delta.kind == "dora":
        return _of_dora(delta, chosen, of)
    tensors = {name: tensor.detach().clone() for name, tensor in delta.tensors().items()}
    if "t1" in tensors or delta.kind == "lokr" and _first(tensors).shape[0] % of:
        delta = _plain(delta)
        tensors = {name: tensor.detach().clone() for name, tensor in delta.tensors().items()}
    cut = {name: _rows(tensor, chosen, of) if name in OUTPUTS[delta.kind] else tensor
           for name, tensor in tensors.items()}
    if "shape" in cut:
        cut["shape"] = _outputs(tensors["shape"], len(chosen), of)
    return type(delta).from_tensors(_without_idle_ranks(delta.kind, cut))


def _rows(tensor: Tensor, chosen: Sequence[int], of: int) -> Tensor:
    if tensor.shape[0] % of:
        raise UserError(f"a change of {tensor.shape[0]} outputs cannot be cut into {of} equal parts")
    parts = tensor.chunk(of)
    return torch.cat([parts[i] for i in chosen])


def _outputs(shape: Tensor, times: int, of: int) -> Tensor:
    """The shape of a change with times / of as many outputs."""
    shape = shape.clone()
    shape[0] = shape[0] * times // of
    return shape


def _first(tensors: Mapping[str, Tensor]) -> Tensor:
    """A LoKr's first factor, or that half of it that has its outputs."""
    return tensors["w1"] if "w1" in tensors else tensors["w1_a"]


def _without_idle_ranks(kind: str, tensors: Tensors) -> Tensors:
    """Without the ranks that are zero in all outputs, at the same scale; all are kept where all are zero."""
    if kind not in ("lora", "loha") or "mid" in tensors:
        return tensors
    busy = torch.stack([tensors[name].flatten(1).count_nonzero(0) for name in OUTPUTS[kind]]).sum(0) > 0
    if busy.all() or not busy.any():
        return tensors
    inputs = {"lora": ("down",), "loha": ("w1_b", "w2_b")}[kind]
    kept = {name: tensors[name][:, busy] for name in OUTPUTS[kind]} | {name: tensors[name][busy] for name in inputs}
    return tensors | kept | {"alpha": tensors["alpha"] * (int(busy.sum()) / busy.numel())}


def _of_dora(delta: Delta, chosen: Sequence[int], of: int) -> Delta:
    around = delta.tensors()
    magnitude = around["magnitude"]
    if magnitude.shape[0] == 1 < delta.shape[0]:
        if len(chosen) < of:
            raise UserError("a DoRA with a magnitude for each input belongs to all outputs together")
    else:
        magnitude = _rows(magnitude, chosen, of)
    return _dora(delta, taken(inner_of(delta), chosen, of), magnitude)


def _dora(like: Delta, inner: Delta, magnitude: Tensor) -> Delta:
    """The one around `inner`, of the strength of another."""
    tensors = {f"inner.{name}": tensor for name, tensor in inner.tensors().items()}
    kind = torch.tensor(list(inner.kind.encode()), dtype=torch.uint8)
    return type(like).from_tensors(tensors | {"magnitude": magnitude, "strength": like.tensors()["strength"],
                                              "inner_kind": kind})


def is_zero(delta: Delta) -> bool:
    """Whether a linear change shows at once that it changes nothing."""
    tensors = delta.tensors()
    if delta.kind == "dense":
        return not any(bool(tensor.any()) for tensor in tensors.values())
    return any(name in tensors and not tensors[name].any() for name in OUTPUTS.get(delta.kind, ()))


# --- below one another -------------------------------------------------------------------------------------


def below(deltas: Sequence[Delta | None]) -> Delta:
    """One change of the outputs of several alike layers, the first's first; None changes nothing.

    LoRAs with one `down` in common keep their rank, others stand in blocks, at the sum of the ranks; a LoHa likewise.
    Kinds that have no such form, and several kinds, become a LoRA of their exact factors, or dense where that is
    smaller. Raises `UserError` for a DoRA beside something else.
    """
    there = [delta for delta in deltas if delta is not None]
    kinds = {delta.kind for delta in there}
    if len({delta.shape for delta in there}) > 1:
        raise UserError(f"changes of {' and '.join(str(delta.shape) for delta in there)} are not of alike layers")
    if "dora" in kinds:
        return _doras(deltas, there)
    if kinds == {"loha"} and all("t1" not in delta.tensors() for delta in there):
        return _in_blocks(deltas, "loha", ("w1_b", "w2_b"))
    if kinds == {"lokr"} and (made := _kroneckers(deltas, there)) is not None:
        return made
    if not all(map(is_plain_lora, there)):
        deltas = [None if delta is None else _plain(delta) for delta in deltas]
        there = [delta for delta in deltas if delta is not None]
    if all(map(is_plain_lora, there)):
        return _in_blocks(deltas, "lora", ("down",))
    like = there[0].weight().detach()
    return DELTAS.get("dense").from_weight(torch.cat(
        [torch.zeros_like(like) if delta is None else delta.weight().detach() for delta in deltas]))


def _in_blocks(deltas: Sequence[Delta | None], kind: str, inputs: tuple[str, ...]) -> Delta:
    """Products of factors: each different set of `inputs` is a block of ranks, and the changes that have it stand there
    below one another. Differing scales go into the first factor."""
    parts = [None if delta is None else {name: tensor.detach().cpu() for name, tensor in delta.tensors().items()}
             for delta in deltas]
    there = [part for part in parts if part is not None]
    blocks: list[Tensors] = []
    for part in there:
        if not any(_same(part, block, inputs) for block in blocks):
            blocks.append(part)
    ends = [*accumulate(_rank(block, inputs) for block in blocks)]
    scales = {float(part["alpha"]) / _rank(part, inputs) for part in there}
    common = scales.pop() if len(scales) == 1 else 1.0
    made: Tensors = {name: torch.cat([block[name] for block in blocks]) for name in inputs}
    for name in OUTPUTS[kind]:
        like = there[0][name]
        rows = [torch.zeros(like.shape[0], ends[-1], *like.shape[2:], device=like.device) for _ in parts]
        for part, row in zip(parts, rows, strict=True):
            if part is not None:
                end = ends[next(i for i, block in enumerate(blocks) if _same(part, block, inputs))]
                own = float(part["alpha"]) / _rank(part, inputs) / common if name == OUTPUTS[kind][0] else 1.0
                row[:, end - _rank(part, inputs):end] = part[name].float() * own
        made[name] = torch.cat(rows)
    made["alpha"] = torch.tensor(common * ends[-1], dtype=torch.float64)
    if "shape" in there[0]:
        made["shape"] = _outputs(there[0]["shape"], len(parts), 1)
    return DELTAS.get(kind).from_tensors(made)


def _rank(part: Mapping[str, Tensor], inputs: Sequence[str]) -> int:
    return part[inputs[0]].shape[0]


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    return all(one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in names)


def _kroneckers(deltas: Sequence[Delta | None], there: list[Delta]) -> Delta | None:
    """LoKrs that differ in the outputs of their first factor alone."""
    parts = [delta.tensors() for delta in there]
    if any(part.keys() != parts[0].keys() for part in parts):
        return None
    (name,) = {"w1", "w1_a"} & parts[0].keys()
    others = [key for key in parts[0] if key != name]
    if not all(_same(part, parts[0], others) and part[name].shape == parts[0][name].shape for part in parts):
        return None
    first = torch.cat([torch.zeros_like(parts[0][name]) if delta is None else delta.tensors()[name].detach()
                       for delta in deltas])
    shape = _outputs(parts[0]["shape"], len(deltas), 1)
    return DELTAS.get("lokr").from_tensors(parts[0] | {name: first, "shape": shape})


def _doras(deltas: Sequence[Delta | None], there: list[Delta]) -> Delta:
    magnitudes = [delta.tensors()["magnitude"] for delta in there if delta.kind == "dora"]
    alike = len(there) == len(deltas) == len(magnitudes)
    if not alike or any(magnitude.shape[0] != there[0].shape[0] for magnitude in magnitudes):
        raise UserError("a DoRA can be joined with DoRAs alone that have a magnitude for each output")
    if len({float(delta.tensors()["strength"]) for delta in there}) > 1:
        raise UserError("DoRAs of several strengths cannot be joined")
    return _dora(there[0], below([inner_of(delta) for delta in there]), torch.cat(magnitudes))


# --- both --------------------------------------------------------------------------------------------------


def _plain(delta: Delta) -> Delta:
    """A linear change as a LoRA of its exact factors, or dense where these are larger or it has none."""
    if is_plain_lora(delta):
        return delta
    if (factors := delta.factors()) is not None:
        up, down = (factor.detach() for factor in factors)
        if up.numel() + down.numel() <= up.shape[0] * down[0].numel():
            return DELTAS.get("lora").from_factors(up, down, float(down.shape[0]))
    return DELTAS.get("dense").from_weight(delta.weight().detach())
