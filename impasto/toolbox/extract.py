"""The adapter between two checkpoints: what a fine-tune changed, layer by layer, at low rank.

Both files are read in step, one tensor at a time; what is kept of each layer is its factors. A full difference of a
layer is never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.kronecker import Kronecker, factorization
from impasto.deltas.ranks import Wanted, chosen
from impasto.deltas.resize import Kept, low_rank
from impasto.deltas.spectrum import Spectrum, of_matrix
from impasto.formats import names
from impasto.formats.arrangement import save_arranged
from impasto.formats.checkpoint import WORDS, Checkpoint, open_checkpoint
from impasto.formats.rewrite import finite, lockstep
from impasto.toolbox.alike import shared
from impasto.toolbox.mix import Made
from impasto.toolbox.places import check_output, made_of

#: components whose changes an adapter can hold
HELD = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
#: ranks that are looked at where a share or a size is asked for; beyond them the spectrum is too flat for an adapter
MOST = 128
#: LoKr's factor, where none is given: as LyCORIS' extraction
FACTOR = 8


@dataclass
class Changed:
    """What is met on the way: spectra or products by layer, shapes, and norms of what no adapter holds."""

    spectra: dict[str, Spectrum] = field(default_factory=dict)
    products: dict[str, tuple[Delta, Kept]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    #: by what it is: tensors that changed, and the square of the norm of their change
    left: dict[str, tuple[int, float]] = field(default_factory=dict)


def extracted(base: Path | str, tuned: Path | str, wanted: Wanted | None = None, *, kind: Literal["lora", "lokr"] =
              "lora", factor: int = FACTOR, report: Reporter = SILENT) -> tuple[Adapter, Made]:
    """The change from `base` to `tuned`, as an adapter; and what of each layer it keeps.

    LoRA: each layer as the best of the ranks that `wanted` asks for. LoKr: the nearest Kronecker product of a factor
    `factor` wide at most and a whole one (Van Loan & Pitsianis 1993). Layers that did not change are left out; so are
    biases, norms and the VAE, of which a remark tells. Raises `UserError`: checkpoints of different families or shapes,
    or without a difference.
    """
    if wanted is not None and wanted.energy is not None and wanted.measure == "cumulative":
        raise UserError("the sum of all singular values is not known, as the largest alone are computed",
                        where="--by cumulative", fix="ask for a share by fro or by ratio")
    first, second = open_checkpoint(base), open_checkpoint(tuned)
    common = shared(first, [second], "compare")
    if wanted is not None and wanted.known is None:
        wanted = replace(wanted, most=MOST)
    met = Changed()
    total = sum(len(first.names(name)) for name in common)
    with report.phase("comparing", total, "tensors") as advance:
        for component in common:
            for name, one, other in pairs(first, second, component):
                if not _look(f"{component}.{name}", one, other, met, wanted, kind, factor):
                    raise UserError(f"its {component}.{name} holds NaN or infinity",
                                    where=second.path if finite(one) else first.path,
                                    fix="look at it with impasto inspect; a broken merge is the usual cause")
                advance(1)
    adapter, layers = _assembled(met, wanted, first.family)
    told = [one.scheduler.get("prediction_type") for one in (second, first)]
    if words := [WORDS[word] for word in told if word in WORDS]:
        adapter = replace(adapter, metadata={"modelspec.prediction_type": words[0]})
    if not layers:
        what = f"; {'; '.join(_remarks(met))}" if met.left else ""
        raise UserError(f"has no layer that differs from {first.path.name}{what}", where=second.path)
    lone = [name for name in first.components if name not in common]
    remarks = [f"{' and '.join(lone)}: not compared, {second.path.name} has none"] if lone else []
    return adapter, Made((), layers, (*remarks, *_remarks(met), *_short(layers, wanted)))


def extract(base: Path | str, tuned: Path | str, rank: int | None = None, *, energy: float | None = None,
            size: int | None = None, kind: Literal["lora", "lokr"] = "lora", factor: int = FACTOR) -> Adapter:
    """The change from `base` to `tuned`: as a LoRA of `rank`, or of the share `energy` of each layer's Frobenius norm,
    or of `size` bytes in half precision altogether; or as a LoKr. See `extracted`, which also tells what is lost."""
    wanted = Wanted(rank, energy, size) if kind == "lora" else None
    return extracted(base, tuned, wanted, kind=kind, factor=factor)[0]


def extract_to(base: Path | str, tuned: Path | str, out: Path | str, wanted: Wanted | None = None, *,
               kind: Literal["lora", "lokr"] = "lora", factor: int = FACTOR, dtype: torch.dtype = torch.float16,
               force: bool = False, report: Reporter = SILENT) -> Made:
    """Write the adapter between two checkpoints to `out`, in kohya's format; see `extracted`."""
    out = Path(out)
    check_output(out, [base, tuned], force=force, ending=".safetensors")
    adapter, made = extracted(base, tuned, wanted, kind=kind, factor=factor, report=report)
    facts = made_of(extracted={"base": Path(base).name, "tuned": Path(tuned).name})
    return replace(made, files=tuple(save_arranged(adapter, out, dtype=dtype, metadata=facts)))


def pairs(first: Checkpoint, second: Checkpoint, component: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, and both tensors, in the first one's order on the disk."""
    source = first.sources[component]
    owners = source.owners()
    order = [name for key in source.file.shapes for name in owners.get(key, ())]
    for (name, one), (_, other) in zip(lockstep(first, component, order), lockstep(second, component, order),
                                       strict=True):
        yield name, one, other


@torch.no_grad()
def _look(path: str, one: Tensor, other: Tensor, met: Changed, wanted: Wanted | None, kind: str, factor: int) -> bool:
    """Note what of a tensor's change is to be kept. False, and nothing is, if it is not finite."""
    if same(one, other):
        return True
    change = other.float() - one.float()
    if not math.isfinite(float(torch.linalg.vector_norm(change))):
        return False
    layer, _, leaf = path.rpartition(".")
    component = path.partition(".")[0]
    if component not in HELD or leaf != "weight" or change.ndim < 2 or names.is_embedding(layer):
        what = component if component not in HELD else "embeddings" if names.is_embedding(layer) else \
            "norms" if names.is_norm(layer) else "biases"
        count, square = met.left.get(what, (0, 0.0))
        met.left[what] = count + 1, square + float(change.double().square().sum())
        return True
    met.shapes[layer] = tuple(change.shape)
    if kind == "lokr":
        met.products[layer] = nearest_product(change, factor)
    else:
        assert wanted is not None
        met.spectra[layer] = of_matrix(change.flatten(1), wanted.known)
    return True


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; of different types, as the coarser of the two has them: what one of them was
    rounded by is no change."""
    coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarser), other.to(coarser))


def nearest_product(change: Tensor, factor: int) -> tuple[Delta, Kept]:
    """The Kronecker product w1 ⊗ w2 nearest to a weight's change, w1 of `factor` x `factor` at most.

    With the change's blocks as rows of a matrix, kron(w1, w2) has rank 1: the first singular triple is the nearest
    (Van Loan & Pitsianis 1993, "Approximation with Kronecker products").
    """
    rows, columns, *kernel = change.shape
    (a, c), (b, d) = factorization(rows, factor), factorization(columns, factor)
    blocks = change.reshape(a, c, b, d, *kernel).transpose(1, 2).reshape(a * b, -1)
    spectrum = of_matrix(blocks, 1) if min(blocks.shape) > 1 else of_matrix(blocks)
    first, second = spectrum.factors(1)
    delta = Kronecker.from_factors(tuple(change.shape), w1=first.reshape(a, b).contiguous(),
                                   w2=second.reshape(c, d, *kernel).contiguous())
    return delta, Kept(0, spectrum.error(1), math.sqrt(spectrum.total))


def _assembled(met: Changed, wanted: Wanted | None, family: str) -> tuple[Adapter, dict[str, Kept]]:
    if met.products:
        return (Adapter({layer: (delta,) for layer, (delta, _) in met.products.items()}, family=family),
                {layer: kept for layer, (_, kept) in met.products.items()})
    if not met.spectra:
        return Adapter({}, family=family), {}
    assert wanted is not None
    ranks = chosen(met.spectra, wanted)
    deltas: dict[str, tuple[Delta, ...]] = {}
    told: dict[str, Kept] = {}
    for layer, rank in ranks.items():
        spectrum = met.spectra.pop(layer)  # its factors are half the memory
        told[layer] = Kept(rank, spectrum.error(rank), math.sqrt(spectrum.total))
        if rank:
            deltas[layer] = (low_rank(spectrum, rank, met.shapes[layer]),)
    return Adapter(deltas, family=family), told


def _short(layers: dict[str, Kept], wanted: Wanted | None) -> list[str]:
    """A line where the share that is asked for takes more than the ranks that are looked at."""
    if wanted is None or wanted.energy is None:
        return []
    count = sum(kept.rank == wanted.most for kept in layers.values())
    what = f"{count} layer{'s are' if count > 1 else ' is'} cut at rank {wanted.most}"
    return [f"{what}, which may hold less than the share that is asked for"] if count else []


def _remarks(met: Changed) -> list[str]:
    """A line for each kind of thing that changed and is not held."""
    lines = []
    for what, (count, square) in met.left.items():
        tensors = f"{count} tensor{'s' * (count != 1)}, norm {math.sqrt(square):.3g}"
        lines.append(f"the VAE changed too ({tensors}), which no adapter holds" if what == "vae" else
                     f"{what} changed too ({tensors}) and are left out")
    return lines
