"""`impasto inspect`: what a file or folder is and what is in it. Nothing in it is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from impasto.cli import findings, pickle_names
from impasto.cli.console import RichReporter, emit
from impasto.cli.options import Json
from impasto.core.errors import UserError
from impasto.core.files import no_such_file
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.formats.header import Header, read_header
from impasto.mini import BASE, check_weights

if TYPE_CHECKING:
    from impasto.deltas.adapter import Adapter
    from impasto.formats.detect import Detected

#: bytes that take a moment to hash
WORTH_TELLING = 2**28

Findings = dict[str, Any]


def inspect(
    path: Annotated[Path, typer.Argument(
        metavar="FILE", help="An adapter, checkpoint or picture, or a run's folder.")],
    hashes: Annotated[bool, typer.Option("--hashes", help="Hash a checkpoint too: it takes some seconds.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a file is and what is in it, without running any of it."""
    report = RichReporter()
    found = look(path, report, hashes=hashes)
    if as_json:
        emit(found)
    else:
        print("\n".join(findings.lines(found)))


def look(path: Path, report: Reporter, *, hashes: bool = False) -> Findings:
    """What is at `path`, JSON-able. `hashes`: of large files too. Raises `UserError` for what is nothing of ours."""
    if str(path) == "mini":
        check_weights()
        path = BASE
    found: Findings = {"file": str(path)}
    if path.is_dir():
        return found | (run(path) if (path / "recipe.toml").is_file() else known(path))
    if path.is_file():
        found["bytes"] = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(4)
        pickle = path.suffix != ".safetensors" and start.startswith(pickle_names.BEGINNINGS)
        found |= pickled(path) if pickle else known(path)
        hashes = hashes or found["kind"] == "adapter"
    else:
        raise no_such_file(path)
    if hashes:
        told = report if found["bytes"] > WORTH_TELLING else SILENT
        with told.phase("hashing", found["bytes"], "bytes") as advance:
            found["sha256"] = sha256(path, advance)
    return found


def known(path: Path) -> Findings:
    """Anything whose kind its header tells."""
    from impasto.formats.detect import detect

    detected = detect(path)
    if detected.kind == "picture":
        return picture(path)
    if path.is_dir() and detected.kind == "unknown":
        raise UserError("is a folder without a checkpoint, an adapter or a run in it", where=path)
    reads = {"adapter": adapter, "embedding": embedding, "hypernetwork": hypernetwork}
    try:
        return reads[detected.kind](path) if detected.kind in reads else checkpoint(path, detected.kind)
    except UserError as error:
        return other(path, detected, error)


def other(path: Path, detected: Detected, error: UserError) -> Findings:
    """What is known of a file that Impasto itself does not read, and why it does not."""
    from impasto.formats.tensor_files import open_tensors

    where = f"{error.where}: " if error.where and str(error.where) != str(path) else ""
    found: Findings = {"kind": detected.kind, "title": detected.title, "family": detected.family,
                       "layout": detected.layout, "unread": f"{where}{error.what}"}
    if path.is_dir():
        return found
    file = open_tensors(path)
    dtypes: Counter[str] = Counter()
    for name, shape in file.shapes.items():
        dtypes[_dtype(file.dtype(name))] += math.prod(shape)
    return found | {"tensors": len(file.shapes), "parameters": sum(dtypes.values()), "dtypes": dict(dtypes),
                    "first": list(file.shapes)[:3], "metadata": file.metadata}


def adapter(path: Path) -> Findings:
    """An adapter: for what, of what ranks, how strong in which block, and who would load it."""
    from impasto.deltas.told import alpha_of, kinds_of, rank_of
    from impasto.formats.adapters import CODECS, load_adapter
    from impasto.formats.programs import FAMILIES, verdicts

    loaded = load_adapter(path)
    header = None if path.is_dir() else read_header(path)
    terms = [term for terms in loaded.deltas.values() for term in terms]
    ranks = [rank for term in terms if (rank := rank_of(term)) is not None]
    alphas = [alpha for term in terms if (alpha := alpha_of(term)) is not None]
    found: Findings = {
        "kind": "adapter", "family": loaded.family,
        "format": next(name for name in CODECS if CODECS.get(name)().claims(path, header)),
        "layers": len(loaded.layers),
        "components": dict(Counter(layer.partition(".")[0] for layer in loaded.layers)),
        "deltas": dict(Counter(" + ".join(kinds_of(term)) for term in terms)),
        "ranks": _counts(ranks), "alphas": _counts(f"{alpha:g}" for alpha in alphas),
        "norms": block_norms(loaded), "tokens": tokens_of(loaded), "base": loaded.base, "metadata": loaded.metadata,
    }
    if header is not None:
        found |= tensors_of(header) | {"metadata": header.metadata, "without_alpha": without_alpha(header)}
        if loaded.family in FAMILIES:
            found["programs"] = [dataclasses.asdict(v) for v in verdicts(header.tensors, alphas, loaded.family)]
    return found


def without_alpha(header: Header) -> int:
    """How many layers in kohya's parts have no alpha, for which it is the rank."""
    named = (key.removesuffix(".lora_down.weight") for key in header.tensors if key.endswith(".lora_down.weight"))
    return sum(f"{layer}.alpha" not in header.tensors for layer in named)


def hypernetwork(path: Path) -> Findings:
    """A hypernetwork: for which contexts, how it is built, and how large its weights are."""
    from impasto.deltas.hypernetwork import Hypernetwork
    from impasto.formats.adapters import load_adapter
    from impasto.formats.hypernetwork import COMFYUI
    from impasto.formats.pickles import load_pickle

    loaded = load_adapter(path)
    hook = loaded.hooks[0]
    assert isinstance(hook, Hypernetwork)
    dtypes: Counter[str] = Counter()
    for width, pair in load_pickle(path).items():
        for tensor in (tensor for part in pair for tensor in part.values()) if type(width) is int else ():
            dtypes[_dtype(tensor.dtype)] += tensor.numel()
    norms = {width: math.sqrt(sum(float(p.double().square().sum()) for p in pair.parameters()))
             for width, pair in hook.pairs.items()}
    return {"kind": "hypernetwork", "family": loaded.family, "widths": list(hook.widths),
            "structure": list(hook.structure), "activation": hook.activation, "layer_norm": hook.layer_norm,
            "activate_output": hook.activate_output, "dropout": list(hook.dropout), "norms": norms,
            "unread_by": [] if hook.activation in COMFYUI else ["ComfyUI"],
            "parameters": sum(dtypes.values()), "dtypes": dict(dtypes), "base": loaded.base,
            "metadata": loaded.metadata}


def embedding(path: Path) -> Findings:
    """New tokens: how many vectors in each text encoder, and how long they are."""
    from impasto.formats.adapters import CODECS, load_adapter
    from impasto.formats.pictured import other_texts
    from impasto.formats.probe import is_pickle, is_picture

    loaded = load_adapter(path)
    header = None if is_pickle(path) or is_picture(path) else read_header(path)
    found: Findings = {
        "kind": "embedding", "family": loaded.family, "tokens": tokens_of(loaded),
        "format": next(name for name in CODECS if CODECS.get(name)().claims(path, header)),
        "base": loaded.base, "metadata": loaded.metadata if header is None else header.metadata}
    if is_picture(path):
        shown = picture(path)
        return found | {"picture": shown | {"texts": other_texts(shown["texts"])}}
    return found | (tensors_of(header) if header is not None else {})


def tokens_of(loaded: Adapter) -> Findings:
    """By token, then by text encoder: number and width of the vectors, and the norm of each."""
    return {token: {encoder: {"vectors": len(values), "width": values.shape[1],
                              "norms": [round(norm, 4) for norm in values.norm(dim=1).tolist()]}
                    for encoder, values in own.items()} for token, own in loaded.embeddings.items()}


def block_norms(loaded: Adapter) -> dict[str, float]:
    """The Frobenius norm of the whole change of each block, in the network's order."""
    squares: dict[str, float] = {}
    for layer in loaded.layers:
        block = block_of(layer)
        squares[block] = squares.get(block, 0.0) + layer_norm(loaded, layer) ** 2
    order = {"down": 0, "mid": 1, "up": 2}
    return {block: math.sqrt(squares[block]) for block in sorted(squares, key=lambda name: [
        (order.get(word, 9), int(word) if word.isdigit() else 0, word) for word in name.split()])}


def layer_norm(loaded: Adapter, layer: str) -> float:
    """The Frobenius norm of dW; of a LoRA's factors, from their Gram matrices: |UD|² = sum of (UᵀU) ∘ (DDᵀ).

    Of a DoRA without its magnitude, which counts only beside a base's weight.
    """
    import torch

    from impasto.deltas.told import inner_of

    terms = [inner_of(term) for term in loaded.deltas[layer] if term.shape]
    factors = terms[0].factors() if len(terms) == 1 and terms[0].kind == "lora" else None
    if factors is None:
        return float(torch.as_tensor(sum(term.weight() for term in terms)).norm())
    up, down = (factor.detach().flatten(1).double() for factor in factors)
    return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))


def block_of(layer: str) -> str:
    """Where in the network a layer is: `unet down 1`, `unet mid`, `text_encoder 11`, `transformer 23`, `unet other`."""
    component = layer.partition(".")[0]
    if match := re.search(r"\.(down|up)_blocks\.(\d+)\.|\.(mid)_block\.|\.(?:layers|block)\.(\d+)\.|"
                          r"^transformer\.transformer_blocks\.(\d+)\.", layer):
        return " ".join([component, *(part for part in match.groups() if part)])
    return f"{component} other"


def tensors_of(header: Header) -> Findings:
    """How many tensors and parameters there are, and of what types."""
    dtypes: Counter[str] = Counter()
    for info in header.tensors.values():
        dtypes[_dtype(info.dtype)] += math.prod(info.shape)
    return {"tensors": len(header.tensors), "parameters": sum(dtypes.values()), "dtypes": dict(dtypes)}


def checkpoint(path: Path, kind: str = "checkpoint") -> Findings:
    """A checkpoint or a VAE: its family, layout and components, from the header alone."""
    from impasto.formats.checkpoint import open_checkpoint

    opened = open_checkpoint(path)
    components = {}
    for name in opened.components:
        dtypes: Counter[str] = Counter()
        tensors = opened.names(name)
        for shape, dtype in tensors.values():
            dtypes[_dtype(dtype)] += math.prod(shape)
        components[name] = {"tensors": len(tensors), "parameters": sum(dtypes.values()), "dtypes": dict(dtypes)}
    return {"kind": kind, "family": opened.family, "layout": opened.layout, "variant": opened.variant,
            "components": components, "scheduler": opened.scheduler, "surplus": opened.surplus,
            "metadata": opened.metadata}


def pickled(path: Path) -> Findings:
    """An old file, or a pickle that was refused: what it names and why. Nothing of it is run."""
    named = pickle_names.names(path)
    try:
        return known(path) | {"imports": named}
    except UserError as error:
        return {"kind": "pickle", "refused": error.what, "fix": error.fix, "imports": named}


def picture(path: Path) -> Findings:
    """A picture and what its file tells of how it was made."""
    from impasto.families.picture_info import open_picture, picture_texts

    opened = open_picture(path)
    texts = picture_texts(opened)
    found: Findings = {"kind": "picture", "size": list(opened.size), "texts": texts}
    try:
        told = json.loads(texts.get("impasto", ""))
        found["command"] = command(told)
    except (ValueError, KeyError, TypeError, AttributeError, UserError):
        pass  # not a picture of ours, or one that was tampered with
    return found


def command(told: dict[str, Any]) -> str:
    """The command line that draws a picture of ours again."""
    from impasto.families.picture_info import unnamed_adapters

    settings = told["settings"]
    words = ["impasto", "generate", told["base"], "--seed", told["seed"], "--steps", settings["steps"],
             "--guidance", settings["guidance"], "--scheduler", settings["scheduler"],
             "--size", f"{settings['width']}x{settings['height']}"]
    for entry in unnamed_adapters(told):
        words += ["--adapter", f"{entry['file']}:{entry['strength']:g}"]
    if told["negative"]:
        words += ["--negative", told["negative"]]
    if told["init"]:
        words += ["--init", told["init"]]
        edits = told.get("variant") == "instruct-pix2pix"  # pictures of older versions do not tell
        words += ["--image-guidance", settings["image_guidance"]] if edits else ["--strength", settings["strength"]]
    if told.get("mask"):
        words += ["--mask", told["mask"]]
    if told.get("refiner"):
        words += ["--refiner", told["refiner"], "--handover", settings["handover"]]
    if skip := told["text"].get("clip_skip"):
        words += ["--clip-skip", skip]
    for option in ("vae", "prediction"):
        words += [f"--{option}", told[option]] if told.get(option) else []
    for file in told.get("text_encoders", ()):
        words += ["--text-encoder", file]
    for name, value in told.get("options", {}).items():
        words += ["--base-option", f"{name}={str(value).lower()}"]
    return shlex.join(map(str, [*words, "--", told["prompt"]]))


def run(path: Path) -> Findings:
    """A run's directory: how far it is and what it holds."""
    from impasto.training.recipe import load_recipe

    recipe = load_recipe(str(path / "recipe.toml"))
    log = path / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    steps = [entry for entry in entries if "loss" in entry]
    return {
        "kind": "run", "base": recipe.base.path, "methods": [method.kind for method in recipe.method],
        "step": steps[-1]["step"] if steps else 0, "loss": steps[-1]["loss"] if steps else None,
        "checkpoints": sorted(p.name for p in (path / "checkpoints").glob("*") if p.name.isdigit()),
        "artifacts": sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt")),
    }


def sha256(path: Path, advance: Advance) -> str:
    """The hash that model sites show."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
            advance(len(block))
    return hasher.hexdigest()


def _dtype(dtype: object) -> str:
    """torch's or a header's name of a type, as people write it: fp32, bf16, int64."""
    name = str(dtype).removeprefix("torch.").lower()
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "f32": "fp32", "f16": "fp16"}.get(name, name)


def _counts(values: Iterable[object]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    return dict(Counter(map(str, values)).most_common())
