"""Files from format to format, and adapters from kind to kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError, nearest
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted
from impasto.deltas.resize import Kept, low_rank, resized
from impasto.deltas.spectrum import of_matrix
from impasto.formats.adapters import load_adapter
from impasto.formats.arrangement import save_arranged
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.detect import detect
from impasto.toolbox.extract import FACTOR, nearest_product
from impasto.toolbox.layouts import to_file, to_folder
from impasto.toolbox.mix import Made, linear, storable, weights_of
from impasto.toolbox.places import check_output, made_of

#: what may be asked for -> the format of deltas, of one new token, of a hypernetwork ("" where it has no place)
FORMATS: dict[str, tuple[str, str, str]] = {
    "kohya": ("kohya", "webui-embedding", "hypernetwork"), "webui": ("kohya", "webui-embedding", "hypernetwork"),
    "comfyui": ("kohya", "webui-embedding", "hypernetwork"), "lycoris": ("kohya", "", ""),
    "diffusers": ("diffusers", "diffusers-embedding", ""), "peft": ("peft", "", ""),
}
CHECKPOINTS = ("ldm", "diffusers")
KINDS = ("lora", "lokr")


def convert(path: Path | str, out: Path | str, *, to: str | None = None, kind: str | None = None,
            wanted: Wanted | None = None, factor: int = FACTOR, base: Path | str | None = None,
            dtype: torch.dtype | None = None, force: bool = False, report: Reporter = SILENT) -> Made:
    """Write what is at `path` in another format, or an adapter as another kind; or both.

    A checkpoint becomes a single file ("ldm") or a folder ("diffusers"), bit for bit unless `dtype` says otherwise. An
    adapter's changes stay what they are, or become LoRAs: exactly where they have factors smaller than the layer, else
    at the ranks of `wanted`; or LoKrs, the nearest ones. `base` is needed to turn a DoRA into something else. Raises
    `UserError`.
    """
    path, out = Path(path), Path(out)
    if kind is not None and kind not in KINDS:
        raise UserError(f"there is no conversion to the kind {kind!r}", where="--kind", fix=nearest(kind, KINDS))
    if to is not None and to not in (*FORMATS, *CHECKPOINTS):
        raise UserError(f"there is no format {to!r}", where="--to", fix=nearest(to, (*FORMATS, *CHECKPOINTS)))
    if detect(path).kind in ("checkpoint", "unet", "vae"):
        return _checkpoint(path, out, to, kind, dtype, force, report)
    check_output(out, [path], force=force)
    adapter = load_adapter(path)
    layers: Mapping[str, Kept] = {}
    if kind is not None:
        weights = None if base is None else weights_of(open_checkpoint(base))
        adapter = linear(adapter, weights)
        with report.phase(f"to {kind}", len(adapter.deltas), "layers") as advance:
            adapter, layers = as_lora(adapter, wanted, advance) if kind == "lora" else as_lokr(adapter, factor, advance)
    elif wanted is not None:
        raise UserError("a rank is asked for without a kind", where=path, fix="say --kind lora, or use impasto resize")
    if to == "comfyui":
        adapter = _untuckered(adapter)
    asked = dtype or torch.float16
    files = save_arranged(adapter, out, format=_format(adapter, to, path), dtype=asked,
                          metadata=made_of(converted=path.name) if kind else None)
    return Made(tuple(files), layers, _rounding(adapter, asked))


def _checkpoint(path: Path, out: Path, to: str | None, kind: str | None, dtype: torch.dtype | None, force: bool,
                report: Reporter) -> Made:
    checkpoint = open_checkpoint(path)
    if kind is not None:
        raise UserError("is a checkpoint, which has no kind of change", where=path,
                        fix="impasto extract makes an adapter of the difference of two")
    if to is not None and to not in CHECKPOINTS:
        raise UserError(f"is a checkpoint, which is no {to} file", where=path, fix="say --to ldm or --to diffusers")
    to = to or ("ldm" if path.is_dir() else "diffusers")
    (to_file if to == "ldm" else to_folder)(checkpoint, out, dtype=dtype, force=force, report=report)
    left = checkpoint.surplus
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return Made((out,), {}, (f"left out, as no part of the checkpoint: {', '.join(left[:3])}{more}",) if left else ())


def _format(adapter: Adapter, to: str | None, path: Path) -> str:
    """The codec's name. `UserError` where the format has no place for what the adapter holds."""
    if to is None:
        return "auto"
    if to == "ldm":
        raise UserError("is an adapter, and ldm is a layout of checkpoints", where=path,
                        fix=f"say one of {', '.join(FORMATS)}")
    deltas, token, hook = FORMATS[to]
    if adapter.hooks:
        name = hook if not (adapter.deltas or adapter.embeddings) else "auto" if hook else ""
        what = "a hypernetwork"
    elif adapter.embeddings and not adapter.deltas:
        name, what = token, "new tokens"
    else:
        name, what = deltas, "changes of layers"
    if not name:
        raise UserError(f"holds {what}, for which {to} files have no place", where=path,
                        fix="say --to webui, or leave --to out")
    return name


# --- kinds -------------------------------------------------------------------------------------------------


def as_lora(adapter: Adapter, wanted: Wanted | None, advance: Advance) -> tuple[Adapter, Mapping[str, Kept]]:
    """Every change of a layer as a LoRA: of its own exact factors, or with `wanted` the best of a rank.

    Exact factors of a higher rank than the layer can have are brought to that. Raises `UserError`, without `wanted`,
    for a change that has none.
    """
    if wanted is not None:
        return resized(adapter, wanted, None, advance)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for layer, terms in adapter.deltas.items():
        deltas[layer] = tuple(term if len(term.shape) < 2 else _exactly(layer, term) for term in terms)
        advance(1)
    return replace(adapter, deltas=deltas), {}


def _exactly(layer: str, term: Delta) -> Delta:
    """A change as a LoRA of the same rank."""
    factors = term.factors()
    if factors is None:
        raise UserError("has a change without low-rank factors", where=layer,
                        fix="say at which rank it is to be a LoRA (--rank, --energy or --size)")
    up, down = (factor.detach() for factor in factors)
    most = min(up.shape[0], down[0].numel())
    if up.shape[1] <= most:
        return LowRank.from_factors(up, down, float(down.shape[0]))
    return low_rank(of_matrix(term.weight().detach().flatten(1)), most, term.shape)


def as_lokr(adapter: Adapter, factor: int, advance: Advance) -> tuple[Adapter, Mapping[str, Kept]]:
    """Every change of a layer's matrix as the nearest Kronecker product of whole factors."""
    deltas: dict[str, tuple[Delta, ...]] = {}
    told: dict[str, Kept] = {}
    for layer, terms in adapter.deltas.items():
        own = [term for term in terms if len(term.shape) > 1]
        if own:
            change = sum((term.weight() for term in own[1:]), start=own[0].weight()).detach()
            delta, told[layer] = nearest_product(change, factor)
            terms = (delta, *(term for term in storable(terms) if len(term.shape) < 2))
        deltas[layer] = terms
        advance(1)
    return replace(adapter, deltas=deltas), told


def _untuckered(adapter: Adapter) -> Adapter:
    """LoKrs with the core multiplied into their second factor: ComfyUI fails on a core there (FORMATS: torch.kron on a
    view, logged, and the layer left as it is)."""
    def plain(term: Delta) -> Delta:
        tensors = dict(term.tensors())
        if term.kind != "lokr" or "t2" not in tensors:
            return term
        return type(term).from_tensors(_multiplied(tensors))

    return replace(adapter, deltas={layer: tuple(map(plain, terms)) for layer, terms in adapter.deltas.items()})


def _multiplied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoKr's tensors without its core; the scale goes into the factor, where alpha means nothing any more."""
    rank, alpha = tensors["w2_b"].shape[0], float(tensors["alpha"])
    w2 = torch.einsum("ij...,jr,ip->pr...", tensors["t2"], tensors["w2_b"], tensors["w2_a"])
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("t2", "w2_a", "w2_b")}
    w1 = {} if "w1" in kept else {"w1": kept.pop("w1_a") @ kept.pop("w1_b")}
    return kept | w1 | {"w2": w2 * (alpha / rank)}


def _rounding(adapter: Adapter, dtype: torch.dtype) -> tuple[str, ...]:
    """A line about what the file's type rounds of the numbers, if it rounds any."""
    gap = whole = 0.0
    for terms in adapter.deltas.values():
        for tensor in (tensor for term in terms for name, tensor in term.tensors().items() if name != "alpha"):
            if tensor.is_floating_point():
                gap += float((tensor.float() - tensor.to(dtype).float()).double().square().sum())
                whole += float(tensor.double().square().sum())
    if not gap:
        return ()
    return (f"its numbers are rounded to {str(dtype).removeprefix('torch.')}: {100 * (gap / whole) ** 0.5:.2g}% of "
            "their size",)
