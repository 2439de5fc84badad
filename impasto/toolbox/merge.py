"""Adapters into a checkpoint, and checkpoints with checkpoints: one pass over the file, in fp32, each cast once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError, nearest
from impasto.core.progress import SILENT, Reporter
from impasto.core.weighted import Weighted
from impasto.deltas.delta import Delta
from impasto.deltas.fit import alike
from impasto.formats import names
from impasto.formats.adapters import canonical_layers, load_adapter
from impasto.formats.checkpoint import Checkpoint, open_checkpoint
from impasto.formats.detect import detect
from impasto.formats.rewrite import Change, in_order, lockstep, rewrite
from impasto.toolbox.alike import shared
from impasto.toolbox.blocks import PLAIN, Blocks
from impasto.toolbox.places import check_output, left_out, made_of


@dataclass(frozen=True)
class Told:
    """What a merge did: layers or tensors that it changed, and remarks."""

    changed: int
    remarks: tuple[str, ...] = ()


# --- adapters ----------------------------------------------------------------------------------------------


def merge_adapters(base: Path | str, adapters: Sequence[Weighted], out: Path | str, *, blocks: Blocks = PLAIN,
                   dtype: torch.dtype | None = None, force: bool = False, report: Reporter = SILENT) -> Told:
    """Write base + Σ strength · factor of the block · dW to `out`, in the base's own layout and types.

    A change that depends on the weight (DoRA) sees the base's own, as when it is attached. Raises `UserError` before a
    byte is written: for an adapter of another family or shape, a layer that is not there, new tokens or a hypernetwork,
    which no weight can hold.
    """
    out = Path(out)
    checkpoint = open_checkpoint(base)
    single = not Path(base).is_dir()
    check_output(out, [base, *(adapter.path for adapter in adapters)], force=force,
                 ending=".safetensors" if single else "")
    terms: dict[str, list[Delta]] = {}
    blocks.check(f"{component}.{name}" for component in checkpoint.components for name in checkpoint.names(component))
    for path, strength in adapters:
        for layer, own in checked(Path(path), checkpoint).items():
            if factor := strength * blocks.of(layer):
                terms.setdefault(layer, []).extend(term if factor == 1 else term.scaled(factor) for term in own)
    told = made_of(merged={"base": Path(base).name, "adapters": [[Path(a.path).name, a.strength] for a in adapters]})
    left = rewrite(checkpoint, out, _adding(terms), dtype=dtype, metadata=told, replace=force, report=report)
    return Told(len(terms), left_out(left, "as they were not read"))


def checked(path: Path, checkpoint: Checkpoint) -> Mapping[str, tuple[Delta, ...]]:
    """An adapter's deltas, if all of it fits the checkpoint."""
    if path.exists() and detect(path).kind in ("checkpoint", "unet", "vae"):
        raise UserError("is a checkpoint, not an adapter", where=path,
                        fix="say --weights to merge checkpoints, or --add-difference")
    adapter = load_adapter(path, family=checkpoint.family)
    if adapter.embeddings or adapter.hooks:
        what = "new tokens" if adapter.embeddings else "a hypernetwork"
        raise UserError(f"holds {what}, which no weight of a checkpoint can hold", where=path,
                        fix="leave it out, and give it where pictures are drawn")
    layers = canonical_layers(adapter, path)
    shapes = {component: checkpoint.names(component) for component in checkpoint.components}
    for layer, terms in layers.items():
        component, _, inside = layer.partition(".")
        found = shapes.get(component, {}).get(f"{inside}.weight")
        if found is not None and not found[1].is_floating_point:
            raise UserError(f"its {layer} is of {str(found[1]).removeprefix('torch.')}, to which nothing can be added",
                            where=checkpoint.path, fix="take a base in floating point")
        if found is None:
            known = [f"{c}.{name.rpartition('.')[0]}" for c, own in shapes.items() for name in own]
            raise UserError(f"changes {layer}, which {checkpoint.path.name} does not have", where=path,
                            fix=nearest(layer, known))
        if checkpoint.sources[component].places[f"{inside}.weight"].how == "identity":
            raise UserError(f"changes {layer}, for which a single file has no place", where=path,
                            fix="merge it into a folder")
        for term in terms:
            check_shape(term, found[0], layer, path, checkpoint)
            if term.bias() is not None and f"{inside}.bias" not in shapes[component]:
                raise UserError(f"changes the bias of {layer}, which has none in {checkpoint.path.name}", where=path,
                                fix="the adapter was made for another base")
    return layers


def check_shape(term: Delta, weight: tuple[int, ...], layer: str, path: Path, checkpoint: Checkpoint) -> None:
    own = (weight[1], weight[0]) if names.is_embedding(layer) else weight
    bias = term.bias()
    if term.shape and not alike(term.shape, own) or bias is not None and bias.shape[0] != weight[0]:
        raise UserError(f"changes {layer} by {term.shape or tuple(bias.shape if bias is not None else ())}, and in "
                        f"{checkpoint.path.name} it is {own}", where=path,
                        fix="the adapter was made for another base")


def _adding(terms: Mapping[str, Sequence[Delta]]) -> Change:
    """The change that adds the terms of each layer to its weight and bias."""

    def change(component: str, name: str, tensor: Tensor) -> Tensor | None:
        layer, _, leaf = f"{component}.{name}".rpartition(".")
        own = terms.get(layer, ())
        if leaf == "bias":
            biases = [bias for term in own if (bias := term.bias()) is not None]
            return sum(biases, start=tensor.to(wide(tensor.dtype))) if biases else None
        own = [term for term in own if term.shape]
        if leaf != "weight" or not own:
            return None
        return summed(tensor, own, transposed=names.is_embedding(layer))

    return change


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are made: fp32, or fp64 of fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def summed(weight: Tensor, terms: Sequence[Delta], *, transposed: bool = False) -> Tensor:
    """W + Σ dW in fp32, or wider if W is; of W's shape. Products of thin factors are added in place."""
    total = weight.to(wide(weight.dtype), copy=True)
    plain = total.T if transposed else total
    W = None if all(term.linear for term in terms) else plain.clone()
    for term in terms:
        factors = term.factors() if term.linear else None
        if factors is not None and factors[0].shape[1] < min(plain.shape[0], plain[0].numel()):
            up, down = factors[0].to(plain), factors[1].flatten(1).to(plain)
            if transposed:
                plain += up @ down
            else:
                plain.view(plain.shape[0], -1).addmm_(up, down)
        else:
            plain += term.weight(None if W is None else W.reshape(term.shape)).reshape(plain.shape).to(plain)
    return total


# --- checkpoints -------------------------------------------------------------------------------------------


def merge_checkpoints(paths: Sequence[Path | str], weights: Sequence[float], out: Path | str, *,
                      blocks: Blocks = PLAIN, dtype: torch.dtype | None = None, force: bool = False,
                      report: Reporter = SILENT) -> Told:
    """Write Σ wᵢ · checkpointᵢ to `out`, in the first one's layout and types.

    A block's factor f goes so far from the first one, with 0, to the sum, with 1. Raises `UserError` for checkpoints of
    different families or shapes, before a byte is written.
    """
    if not all(map(math.isfinite, weights)):
        raise UserError(f"is no list of numbers: {', '.join(f'{weight:g}' for weight in weights)}", where="--weights")
    if len(paths) != len(weights) or len(paths) < 2:
        raise UserError(f"there are {len(paths)} checkpoints and {len(weights)} weights", where="--weights",
                        fix="give one weight for each of two or more checkpoints, as --weights 0.7,0.3")

    def mixture(path: str) -> list[float]:
        factor = blocks.of(path)
        return [1 + factor * (weights[0] - 1), *(factor * weight for weight in weights[1:])]

    facts = {"checkpoints": [Path(path).name for path in paths], "weights": list(weights)}
    return _combined(paths, mixture, blocks, out, facts, dtype, force, report)


def add_difference(base: Path | str, tuned: Path | str, origin: Path | str, strength: float, out: Path | str, *,
                   blocks: Blocks = PLAIN, dtype: torch.dtype | None = None, force: bool = False,
                   report: Reporter = SILENT) -> Told:
    """Write base + strength · (tuned − origin) to `out`: what made `tuned` of its origin, done to another base."""

    def mixture(path: str) -> list[float]:
        own = strength * blocks.of(path)
        return [1.0, own, -own]

    facts = {"base": Path(base).name, "tuned": Path(tuned).name, "origin": Path(origin).name, "strength": strength}
    return _combined([base, tuned, origin], mixture, blocks, out, facts, dtype, force, report, wider=True)


def _combined(paths: Sequence[Path | str], mixture: Callable[[str], list[float]], blocks: Blocks, out: Path | str,
              facts: Mapping[str, object], dtype: torch.dtype | None, force: bool, report: Reporter,
              wider: bool = False) -> Told:
    """Write a linear combination of checkpoints, its coefficients by a tensor's path."""
    out = Path(out)
    first, *others = (open_checkpoint(path) for path in paths)
    check_output(out, paths, force=force, ending="" if Path(paths[0]).is_dir() else ".safetensors")
    common = shared(first, others, "merge", wider=wider)
    blocks.check(f"{component}.{name}" for component in first.components for name in first.names(component))
    for other in others:
        _check_identities(first, other, common)
        if not wider:
            _check_predictions(first, other)
    left = [name for name in first.components if name not in common]
    streams = {name: [lockstep(other, name, in_order(first, name, dtype)) for other in others] for name in common}
    changed = 0

    def change(component: str, name: str, tensor: Tensor) -> Tensor | None:
        nonlocal changed
        if component not in streams:
            return None
        read = [next(stream) for stream in streams[component]]
        assert all(other == name for other, _ in read), (name, read[0][0])
        own, *rest = mixture(f"{component}.{name}")
        if not tensor.is_floating_point() or own == 1 and not any(rest):
            return None
        changed += 1
        total = tensor.to(wide(tensor.dtype)) * own
        for weight, (_, other) in zip(rest, read, strict=True):
            part = total if other.numel() == total.numel() else total[:, :other.shape[1]]
            part += weight * other.to(total).reshape(part.shape)
        return total

    unread = rewrite(first, out, change, dtype=dtype, metadata=made_of(merged=facts), replace=force, report=report)
    remarks = (f"{' and '.join(left)}: as in {first.path.name}; the others have none",) if left else ()
    return Told(changed, (*remarks, *left_out(unread, "as they were not read")))


def _check_predictions(first: Checkpoint, other: Checkpoint) -> None:
    """Raise a `UserError` for networks of which a sum would predict neither what one does nor the other."""
    kinds = [checkpoint.scheduler.get("prediction_type") for checkpoint in (first, other)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise UserError(f"predicts {kinds[1]}, and {first.path.name} {kinds[0]}: a sum of them would predict neither",
                        where=other.path, fix="merge checkpoints that predict the same; impasto convert --prediction "
                        "corrects a file that tells it wrongly")


def _check_identities(first: Checkpoint, other: Checkpoint, common: Sequence[str]) -> None:
    """Raise a `UserError` for a layer that the first one's file has no place for, as it is an identity there, and
    that the other one has otherwise."""
    for component in common:
        for name, place in first.sources[component].places.items():
            if place.how == "identity":
                tensor = other.tensor(component, name).float()
                if not torch.equal(tensor, torch.eye(len(tensor))):
                    raise UserError(f"has a {component}.{name} of its own, for which a single file has no place",
                                    where=other.path, fix="begin with a checkpoint that is a folder")
