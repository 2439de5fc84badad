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
from impasto.deltas.resize import Kept, biases_of, low_rank, resized
from impasto.deltas.spectrum import of_matrix
from impasto.deltas.told import inner_of
from impasto.formats.adapters import load_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.detect import detect
from impasto.formats.rewrite import rewrite
from impasto.toolbox.extract import FACTOR, nearest_product
from impasto.toolbox.layouts import noise_left_out, to_file, to_folder
from impasto.toolbox.mix import Made, linear, save_all, weights_of, without_network
from impasto.toolbox.places import check_output, left_out, made_of

#: what may be asked for -> the format of deltas, of one new token, of a hypernetwork ("" where it has no place)
FORMATS: dict[str, tuple[str, str, str]] = {
    "kohya": ("kohya", "webui-embedding", "hypernetwork"), "webui": ("kohya", "webui-embedding", "hypernetwork"),
    "comfyui": ("kohya", "webui-embedding", "hypernetwork"), "lycoris": ("kohya", "", ""),
    "onetrainer": ("onetrainer", "", ""), "diffusers": ("diffusers", "diffusers-embedding", ""),
    "peft": ("peft", "", ""),
}
CHECKPOINTS = ("ldm", "diffusers")
KINDS = ("lora", "lokr")


def convert(path: Path | str, out: Path | str, *, to: str | None = None, kind: str | None = None,
            wanted: Wanted | None = None, factor: int = FACTOR, base: Path | str | None = None,
            dtype: torch.dtype | None = None, prediction: str | None = None, ema: bool = False, force: bool = False,
            report: Reporter = SILENT) -> Made:
    """Write what is at `path` in another format, or an adapter as another kind; or both.

    A checkpoint becomes a single file ("ldm") or a folder ("diffusers"), bit for bit unless `dtype` says otherwise. An
    adapter's changes stay what they are, or become LoRAs: exactly where they have factors smaller than the layer, else
    at the ranks of `wanted`; or LoKrs, the nearest ones. `base` is needed to turn a DoRA into something else.
    `prediction`: what a checkpoint's network predicts, where it does not tell; `ema`: the running average of its
    weights in place of the last ones. Raises `UserError`.
    """
    path, out = Path(path), Path(out)
    if kind is not None and kind not in KINDS:
        raise UserError(f"there is no conversion to the kind {kind!r}", where="--kind", fix=nearest(kind, KINDS))
    if to is not None and to not in (*FORMATS, *CHECKPOINTS):
        raise UserError(f"there is no format {to!r}", where="--to", fix=nearest(to, (*FORMATS, *CHECKPOINTS)))
    if detect(path).kind in ("checkpoint", "unet", "vae"):
        if wanted is not None or base is not None:
            raise UserError("is a checkpoint, for which no rank and no base can be asked", where=path,
                            fix="impasto extract makes an adapter of the difference of two")
        return _checkpoint(path, out, to, kind, dtype, prediction, ema, force, report)
    if ema:
        raise UserError("is an adapter, which has no running average", where=path, fix="leave --ema out")
    if prediction is not None:
        raise UserError("is an adapter, which predicts nothing itself", where=path, fix="leave --prediction out")
    if wanted is not None and kind != "lora":
        raise UserError("a rank is asked for, which is a LoRA's", where=path, fix="say --kind lora, or impasto resize")
    check_output(out, [path, base], force=force, ending=None)
    adapter = load_adapter(path)
    layers: Mapping[str, Kept] = {}
    if kind is not None:
        weights = None if base is None else weights_of(open_checkpoint(base))
        adapter = without_network(linear(adapter, weights, path))
        with report.phase(f"to {kind}", len(adapter.deltas), "layers") as advance:
            adapter, layers = as_lora(adapter, wanted, advance) if kind == "lora" else as_lokr(adapter, factor, advance)
    if to == "comfyui":
        adapter = _untuckered(adapter)
    asked = dtype or torch.float16
    files = save_all(adapter, out, [path, base], format=_format(adapter, to, path), dtype=asked, force=force,
                     metadata=made_of(converted=path.name) if kind else None)
    return Made(files, layers, _rounding(adapter, asked))


def _checkpoint(path: Path, out: Path, to: str | None, kind: str | None, dtype: torch.dtype | None,
                prediction: str | None, ema: bool, force: bool, report: Reporter) -> Made:
    checkpoint = open_checkpoint(path).predicting(prediction)
    checkpoint = checkpoint.averaged() if ema else checkpoint
    if kind is not None:
        raise UserError("is a checkpoint, which has no kind of change", where=path,
                        fix="impasto extract makes an adapter of the difference of two")
    if to is not None and to not in CHECKPOINTS:
        raise UserError(f"is a checkpoint, which is no {to} file", where=path, fix="say --to ldm or --to diffusers")
    to = to or ("ldm" if out.suffix == ".safetensors" else "diffusers")
    own = (to == "diffusers") == path.is_dir() and not ema and prediction is None
    if own:  # its own layout: all of it, in another type, or no pickle
        check_output(out, [path], force=force, ending="" if path.is_dir() else ".safetensors")
        left = rewrite(checkpoint, out, lambda *_: None, dtype=dtype, replace=force, report=report)
        return Made((out,), {}, left_out(left, "as they were not read"))
    noise = noise_left_out(checkpoint) if to == "ldm" else ()
    (to_file if to == "ldm" else to_folder)(checkpoint, out, dtype=dtype, force=force, report=report)
    left = left_out([*checkpoint.surplus, *checkpoint.unused], "as no part of the checkpoint")
    return Made((out,), {}, (*left, *noise))


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
            terms = (delta, *biases_of(terms, factored=True))
        deltas[layer] = terms
        advance(1)
    return replace(adapter, deltas=deltas), told


def _untuckered(adapter: Adapter) -> Adapter:
    """LoKrs with the core multiplied into their second factor: ComfyUI fails on a core there (FORMATS: torch.kron on a
    view, logged, and the layer left as it is)."""
    def plain(term: Delta) -> Delta:
        inner = inner_of(term)
        tensors = dict(inner.tensors())
        if inner.kind != "lokr" or "t2" not in tensors:
            return term
        made = _multiplied(tensors)
        if inner is not term:  # under DoRA
            around = {name: tensor for name, tensor in term.tensors().items() if not name.startswith("inner.")}
            return type(term).from_tensors(around | {f"inner.{name}": tensor for name, tensor in made.items()})
        return type(term).from_tensors(made)

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
