"""Sums of adapters, and adapters at lower ranks: files in, a file out, and what was lost on the way."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.fit import alike, shaped
from impasto.deltas.ranks import Wanted
from impasto.deltas.resize import Kept, Weights, overall, resized
from impasto.formats import names
from impasto.formats.adapters import canonical_layers, load_adapter
from impasto.formats.arrangement import arranged, save_arranged
from impasto.formats.checkpoint import Checkpoint, open_checkpoint
from impasto.toolbox.blocks import PLAIN, Blocks
from impasto.toolbox.places import check_output, made_of


@dataclass(frozen=True)
class Made:
    """Files that were written, and for each layer that lost something, or was measured, what it kept."""

    files: tuple[Path, ...]
    layers: Mapping[str, Kept]
    remarks: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """What is lost of all measured layers together, relative, in Frobenius norm."""
        return overall(self.layers)


def resize(path: Path | str, wanted: Wanted, out: Path | str, *, base: Path | str | None = None,
           dtype: torch.dtype = torch.float16, force: bool = False, report: Reporter = SILENT) -> Made:
    """Write the adapter at lower ranks, each layer as the best LoRA of its rank.

    A DoRA becomes a LoRA too, of what it does to the weights of `base`. Raises `UserError`.
    """
    return mix([Weighted(str(path))], out, wanted=wanted, base=base, dtype=dtype, force=force, report=report)


def mix(adapters: Sequence[Weighted], out: Path | str, *, wanted: Wanted | None = None, base: Path | str | None = None,
        blocks: Blocks = PLAIN, format: str = "auto", dtype: torch.dtype = torch.float16, force: bool = False,
        report: Reporter = SILENT) -> Made:
    """Write Σ strength · adapter: exactly, or with `wanted` at lower ranks.

    LoRAs lie side by side along the rank; other kinds come together by their exact factors, or where these would be
    larger than the layer, as its full difference. Tokens and hypernetworks are carried along. A change that depends on
    the weight (DoRA) is told from the weights of `base`. Raises `UserError`: adapters of different families or shapes,
    or that share no layer.
    """
    out = Path(out)
    inputs = [base, *(adapter.path for adapter in adapters)]
    check_output(out, inputs, force=force, ending=None)
    loaded = [(Path(path), load_adapter(path), strength) for path, strength in adapters]
    checkpoint = None if base is None else open_checkpoint(base)
    weights = None if checkpoint is None else weights_of(checkpoint)
    _check_alike([(path, adapter) for path, adapter, _ in loaded], checkpoint)
    blocks.check(layer for _, adapter, _ in loaded for layer in canonical_layers(adapter, ""))
    total = None
    for path, adapter, strength in loaded:
        own = scaled(linear(adapter, weights, path), strength, blocks)
        total = own if total is None else total + like(own, total)
    assert total is not None
    layers: Mapping[str, Kept] = {}
    if wanted is not None:
        with report.phase("resizing", len(total.deltas), "layers") as advance:
            total, layers = resized(total, wanted, None, advance)
    else:
        total = replace(total, deltas={layer: storable(terms) for layer, terms in total.deltas.items()})
    facts = made_of(mixed=[[path.name, strength] for path, _, strength in loaded])
    files = save_all(without_network(total), out, inputs, format=format, dtype=dtype, metadata=facts, force=force)
    kept = any(adapter.embeddings and strength != 1 for _, adapter, strength in loaded)
    return Made(files, layers, ("new words are carried along as they are: no strength changes them",) if kept else ())


#: endings of files by format; peft's are folders
ENDINGS = {"hypernetwork": ".pt", "peft": ""}
#: metadata of how an adapter's network was made, which a sum or another kind has not
NETWORK = ("ss_network_module", "ss_network_args", "ss_network_dim", "ss_network_alpha")


def without_network(adapter: Adapter) -> Adapter:
    """The adapter without what its metadata say of its kind and ranks."""
    return replace(adapter, metadata={key: value for key, value in adapter.metadata.items() if key not in NETWORK})


def save_all(adapter: Adapter, out: Path, inputs: Iterable[Path | str | None], *, format: str, dtype: torch.dtype,
             metadata: Mapping[str, str] | None, force: bool) -> tuple[Path, ...]:
    """Write an adapter's files, none of which may be an input, or be there without `force`."""
    inputs = list(inputs)
    for part in arranged(adapter, out, format):
        check_output(part.path, inputs, force=force, ending=ENDINGS.get(part.format, ".safetensors"))
    if out.is_dir():  # peft's, which gives way
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".part") as folder:
            made = save_arranged(adapter, Path(folder) / out.name, format=format, dtype=dtype, metadata=metadata)
            os.rename(out, Path(folder) / "old")
            os.rename(made[0], out)
        return (out,)
    return tuple(save_arranged(adapter, out, format=format, dtype=dtype, metadata=metadata))


def weights_of(checkpoint: Checkpoint) -> Weights:
    """The weight of any of its layers, in fp32, read when it is asked for."""
    def weight(layer: str) -> Tensor:
        component, inside = names.split(layer)
        source = checkpoint.sources.get(component)
        if source is None or f"{inside}.weight" not in source.places:
            raise UserError(f"has no layer {layer}", where=checkpoint.path, fix="give the base of the adapter's family")
        tensor = checkpoint.tensor(component, f"{inside}.weight").float()
        return tensor.T if names.is_embedding(layer) else tensor

    return weight


def like(adapter: Adapter, other: Adapter) -> Adapter:
    """The adapter with the shapes that the other one gives to 1×1 convolutions: files hold them as matrices too."""
    deltas = dict(adapter.deltas)
    for layer in adapter.deltas.keys() & other.deltas.keys():
        shapes = [term.shape for term in other.deltas[layer] if term.shape]
        deltas[layer] = tuple(shaped(term, shapes[0]) if shapes else term for term in deltas[layer])
    return replace(adapter, deltas=deltas)


def linear(adapter: Adapter, weights: Weights | None, path: Path | str) -> Adapter:
    """The adapter with every change that depends on the layer's weight as a full difference; `path`: its file."""
    deltas: dict[str, tuple[Delta, ...]] = {}
    for layer, terms in canonical_layers(adapter, "").items():
        if not all(term.linear for term in terms):
            if weights is None:
                raise UserError(f"holds a DoRA on {layer}, whose change depends on the base's weight", where=path,
                                fix="give the base that it is for (--base)")
            W = weights(layer)
            if other := [term.shape for term in terms if not alike(term.shape, tuple(W.shape))]:
                raise UserError(f"changes {layer} by {other[0]}, and in the base it is {tuple(W.shape)}", where=path,
                                fix="give the base that it was made for")
            terms = tuple(term if term.linear else Dense.from_weight(term.weight(W.reshape(term.shape)).detach(),
                                                                     term.bias()) for term in terms)
        deltas[layer] = terms
    return replace(adapter, deltas=deltas)


def scaled(adapter: Adapter, strength: float, blocks: Blocks) -> Adapter:
    """strength · adapter, with the blocks' factors; layers that come to nothing are left out."""
    deltas = {}
    for layer, terms in adapter.deltas.items():
        if factor := strength * blocks.of(layer):
            deltas[layer] = terms if factor == 1 else tuple(term.scaled(factor) for term in terms)
    return replace(adapter, deltas=deltas, hooks=tuple(hook.scaled(strength) for hook in adapter.hooks))


def storable(terms: tuple[Delta, ...]) -> tuple[Delta, ...]:
    """The terms of a layer as files can hold them: those that have no common factors, or larger ones than the layer
    itself, as its full difference."""
    own = [term for term in terms if term.shape]
    if len(own) < 2 or any(term.kind == "dense" for term in own) or {term.kind for term in own} == {"lora"}:
        return terms
    factors = [term.factors() for term in own]
    numbers = sum(up.numel() + down.numel() for up, down in (found for found in factors if found is not None))
    if None not in factors and numbers <= math.prod(own[0].shape):
        return terms
    whole = Dense.from_weight(sum((term.weight() for term in own[1:]), start=own[0].weight()).detach())
    return (whole, *(term for term in terms if not term.shape))


def _check_alike(loaded: Sequence[tuple[Path, Adapter]], checkpoint: Checkpoint | None) -> None:
    """Raise a `UserError` for adapters of different families, or two that have nothing in common."""
    families = {adapter.family: path for path, adapter in loaded if adapter.family}
    if checkpoint is not None and checkpoint.family:
        families.setdefault(checkpoint.family, checkpoint.path)
    if len(families) > 1:
        (one, first), (other, second), *_ = families.items()
        raise UserError(f"is for {other}, and {first.name} is for {one}", where=second,
                        fix="mix adapters of one family")
    layered = [(path, adapter) for path, adapter in loaded if adapter.deltas]
    for (one, mine), (other, theirs) in zip(layered, layered[1:], strict=False):
        if not mine.deltas.keys() & theirs.deltas.keys() and _components(mine) & _components(theirs):
            raise UserError(f"shares no layer with {one.name}, though both change the same network", where=other,
                            fix="look at both with impasto inspect: one may be for another kind of base")


    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, adapter in layered:
        for layer, terms in canonical_layers(adapter, path).items():
            for shape in (term.shape for term in terms if term.shape):
                known, name = shapes.setdefault(layer, (shape, path.name))
                if not alike(shape, known):
                    raise UserError(f"changes {layer} by {shape}, and {name} by {known}", where=path,
                                    fix="they were made for bases of different sizes: mix adapters of one family")


def _components(adapter: Adapter) -> set[str]:
    return {layer.partition(".")[0] for layer in adapter.deltas}
