"""A1111's hypernetwork file, which A1111, Forge and ComfyUI read: a pickle of plain tables of tensors.

Whole numbers are the widths of contexts, each with the state dicts of a pair of networks ("linear.0.weight", …, where
the number counts all modules of the sequence); texts name what the networks are like. As `Hypernetwork.save` and
`load` in modules/hypernetworks/hypernetwork.py of github.com/AUTOMATIC1111/stable-diffusion-webui have it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.core.files import atomic_write
from impasto.deltas.adapter import Adapter
from impasto.deltas.hook import InputHook
from impasto.deltas.hypernetwork import Hypernetwork, check_structure, dropout_of
from impasto.formats.adapter_bytes import Taken, stored
from impasto.formats.adapters import Codec, assemble
from impasto.formats.detect import CONTEXT_WIDTHS, detect
from impasto.formats.header import Header
from impasto.formats.pickles import load_pickle

#: the key of what A1111 has no key for, a text in JSON: A1111, Forge and ComfyUI pass over texts that they do not know
OURS = "impasto"

#: a text of the file -> the metadata in which an `Adapter` has it
TEXTS = {"name": "ss_output_name", "sd_checkpoint": "ss_sd_model_hash", "sd_checkpoint_name": "ss_sd_model_name",
         "optional_info": "ss_training_comment", "weight_initialization": "ss_weight_initialization"}

#: the layers of the oldest files, which had no activation -> their later names
OLDEST = {"linear1": "linear.0", "linear2": "linear.1"}

#: switches of forks that change what the networks compute
FORKS = ("skip_connection", "upsample_linear")

#: activations that ComfyUI knows (comfy_extras/nodes_hypernetwork.py); a file with another it does not load
COMFYUI = ("linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "softsign", "mish")

#: widths, and linear layers of a network, that a file may have: far more than any that was made
MOST = 100


class HypernetworkFile(Codec):
    """One `.pt` file."""

    name = "hypernetwork"
    holds = frozenset({"hooks"})

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is None and path.is_file() and detect(path).kind == "hypernetwork"

    def load(self, path: Path, header: Header | None) -> Adapter:
        return decode(load_pickle(path), path)

    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        table = encode(adapter, dtype, metadata, path)
        _check_meaning(adapter.hooks[0], decode(table, path).hooks[0], dtype)
        with atomic_write(path) as file:
            write_table(file, table)
        if not _same(load_pickle(path), table):
            raise UserError("reads back otherwise than it was written", where=path,
                            fix="the disk or its cache is failing; save to another one")

    def sizes(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> dict[Path, Taken]:
        """Of a file that is written to memory: what is around tensors in it is not simply told."""
        table = encode(adapter, dtype, metadata, path)
        pairs = {width: tuple({name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in network.items()}
                              for network in pair) for width, pair in table.items() if type(width) is int}
        write_table(file := io.BytesIO(), table | pairs)
        tensors = sum(tensor.numel() * tensor.dtype.itemsize for pair in pairs.values() for network in pair
                      for tensor in network.values())
        return {path: Taken(tensors, len(file.getvalue()) - tensors)}


# --- reading -----------------------------------------------------------------------------------------------


def decode(table: Any, where: Path) -> Adapter:
    """The adapter that a file's table says. Raises `UserError` for what is not of this format, naming it."""
    if not isinstance(table, dict) or not (widths := [key for key in table if type(key) is int]):
        raise UserError("holds no hypernetwork", where=where)
    for fork in FORKS:
        if table.get(fork):
            raise UserError(f"is a hypernetwork with {fork}, which only a fork of A1111 computes", where=where)
    told = _ours(table, where)
    structure = _structure(table, where)
    # older files say less: then A1111, which made them, assumes this
    activation = table.get("activation_func") or "linear"
    layer_norm, activate_output = table.get("is_layer_norm", False), table.get("activate_output", True)
    if not isinstance(activation, str) or not isinstance(layer_norm, bool) or not isinstance(activate_output, bool):
        raise UserError("says in no known way what its networks are like (activation_func, is_layer_norm, "
                        "activate_output)", where=where)
    counted = _dropout(table.get("dropout_structure"), table, structure)
    if len(widths) > MOST or min(widths) < 1 or max(widths) > 1 << 20:
        raise UserError(f"has {len(widths)} contexts of widths up to {max(widths, key=abs)}", where=where)
    try:
        with torch.device("meta"):
            hook = Hypernetwork(widths, structure, activation=activation, layer_norm=layer_norm,
                                activate_output=activate_output, dropout=counted)
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from None
    for width in widths:
        _fill(hook, width, table[width], where)
    if "dropout" in told:  # a file of ours, in which dropout takes no place among the layers
        hook = _with_dropout(hook, _dropout(told["dropout"], {}, structure))
    texts = told.get("metadata", {})
    texts = texts if isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values()) else {}
    adapter = assemble({}, {**_told(table), **texts})
    family = adapter.family or _family(widths)
    return replace(adapter, family=family, hooks=(hook.requires_grad_(False).eval(),))


def _ours(table: Mapping[Any, Any], where: Path) -> dict[str, Any]:
    """What we put in beside A1111's fields."""
    try:
        told = json.loads(table.get(OURS, "{}"))
    except (TypeError, ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise UserError(f"its {OURS!r} is not a table in JSON", where=where)
    return told


def _structure(table: Mapping[Any, Any], where: Path) -> list[float]:
    structure = table.get("layer_structure", [1, 2, 1])
    if structure is None:
        structure = [1, 2, 1]
    numbers = isinstance(structure, list | tuple) and len(structure) <= MOST and \
        all(isinstance(multiple, int | float) and not isinstance(multiple, bool) for multiple in structure)
    if not numbers:
        raise UserError("its layer_structure is not a list of numbers", where=where)
    try:
        check_structure(structure)
    except UserError as error:
        raise UserError(error.what, where=where) from None
    return list(structure)


def _dropout(stated: Any, table: Mapping[Any, Any], structure: list[float]) -> tuple[float, ...]:
    """Probabilities after each layer: as they stand, or from the switches that files had before, always 0.3 then."""
    if isinstance(stated, list | tuple) and len(stated) == len(structure) and \
            all(isinstance(p, int | float) and 0 <= p < 1 for p in stated) and not stated[-1]:
        return tuple(float(p) for p in stated)
    probability = 0.3 if table.get("use_dropout") else 0.0
    return dropout_of(structure, probability, last=bool(table.get("last_layer_dropout", False)))


def _fill(hook: Hypernetwork, width: int, pair: Any, where: Path) -> None:
    """Put a pair's tensors in, as fp32. Raises `UserError` for one that is missing, unknown, or of a wrong shape."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, dict) for part in pair):
        raise UserError(f"has no pair of networks for contexts of width {width}", where=where)
    networks = [network for own, _, network in hook.networks() if own == width]
    for network, given in zip(networks, pair, strict=True):
        tensors = {_key(key): tensor for key, tensor in given.items()}
        wanted = {f"linear.{name}": tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if odd := tensors.keys() ^ wanted.keys():
            key = min(odd, key=str)
            raise UserError(f"its networks of width {width} {'lack' if key in wanted else 'have'} the tensor {key!r}, "
                            f"which does not go with structure {list(hook.structure)}, activation {hook.activation}, "
                            f"layer norm {hook.layer_norm}", where=where)
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != wanted[key]:
                found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UserError(f"{key!r} of width {width} is {found}, not {wanted[key]}", where=where)
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise UserError(f"{key!r} of width {width} holds NaN, infinity or whole numbers", where=where,
                                fix="the training that made it has diverged; there is nothing to mend in it")
        network.load_state_dict({key.removeprefix("linear."): tensor.detach().to(torch.float32, copy=True)
                                 for key, tensor in tensors.items()}, assign=True)


def _key(key: Any) -> Any:
    """A state dict's key in today's names."""
    layer, _, part = str(key).rpartition(".")
    return f"{OLDEST[layer]}.{part}" if layer in OLDEST else key


def _with_dropout(hook: Hypernetwork, dropout: tuple[float, ...]) -> Hypernetwork:
    """The same networks with that dropout among their layers."""
    with torch.device("meta"):
        other = Hypernetwork(hook.widths, hook.structure, activation=hook.activation, layer_norm=hook.layer_norm,
                             activate_output=hook.activate_output, dropout=dropout, strength=hook.strength)
    for (_, _, new), (_, _, old) in zip(other.networks(), hook.networks(), strict=True):
        for into, module in zip(_weighted(new), _weighted(old), strict=True):
            into.load_state_dict(module.state_dict(), assign=True)
    return other


def _weighted(network: nn.Sequential) -> list[nn.Module]:
    return [module for module in network if any(True for _ in module.parameters())]


def _told(table: Mapping[Any, Any]) -> dict[str, str]:
    """The metadata that A1111's own fields say."""
    told = {ours: table[key] for key, ours in TEXTS.items() if isinstance(table.get(key), str)}
    step = table.get("step")
    return {**told, "ss_steps": str(step)} if type(step) is int else told


def _family(widths: list[int]) -> str:
    """The family by the width of the text states: of the one that is there."""
    found = {CONTEXT_WIDTHS[width] for width in (768, 1024) if width in widths}
    return found.pop() if len(found) == 1 else ""


# --- writing -----------------------------------------------------------------------------------------------


def encode(adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path) -> dict[Any, Any]:
    """A file's table. Raises `UserError` for what it cannot hold.

    Dropout takes no place among the layers, and all fields say that there is none: ComfyUI, which leaves it on when
    it draws, would draw noise. What was trained with is in our own text.
    """
    (hook,) = adapter.hooks if len(adapter.hooks) == 1 else (None,)
    if hook is None:
        raise UserError(f"a file holds one hypernetwork, and these are {len(adapter.hooks)}", where=where,
                        fix="save them one by one")
    if not isinstance(hook, Hypernetwork):
        raise UserError(f"a {hook.kind} has no place in a hypernetwork's file", where=where)
    for width, _, network in hook.networks():
        if not all(torch.isfinite(parameter).all() for parameter in network.parameters()):
            raise UserError(f"the networks of width {width} hold NaN or infinity", where=where,
                            fix="the training has diverged")
    plain = _at_full_strength(_with_dropout(hook, (0.0,) * len(hook.structure)), where)
    table: dict[Any, Any] = {}
    for width in plain.widths:
        table[width] = tuple(
            {f"linear.{name}": stored(f"{name} of width {width}", tensor.detach().cpu(), dtype, where)
             for name, tensor in network.state_dict().items()}
            for own, _, network in plain.networks() if own == width)
    told: dict[str, Any] = {"metadata": metadata}
    if any(hook.dropout):
        told["dropout"] = list(hook.dropout)
    texts = {key: metadata.get(ours) for key, ours in TEXTS.items()}
    steps = metadata.get("ss_steps", "")
    # all fields, always: of one that is missing A1111 and ComfyUI assume different things
    return table | {
        "step": int(steps) if steps.isascii() and steps.isdigit() else 0, "name": texts["name"] or where.stem,
        "layer_structure": [int(multiple) if multiple == int(multiple) else multiple for multiple in hook.structure],
        "activation_func": hook.activation,
        "is_layer_norm": hook.layer_norm, "weight_initialization": texts["weight_initialization"] or "Normal",
        "use_dropout": False,
        "sd_checkpoint": texts["sd_checkpoint"], "sd_checkpoint_name": texts["sd_checkpoint_name"],
        "activate_output": hook.activate_output, "last_layer_dropout": False,
        "dropout_structure": [0.0] * len(hook.structure), "optional_info": texts["optional_info"],
        OURS: json.dumps(told, sort_keys=True),
    }


def _at_full_strength(hook: Hypernetwork, where: Path) -> Hypernetwork:
    """The same change at strength 1: the strength goes into the last layer, or the last normalisation."""
    if hook.strength == 1:
        return hook
    if hook.activate_output and hook.activation != "linear" and not hook.layer_norm:
        raise UserError(f"the format has no place for the strength {hook.strength:g} of networks that end in "
                        f"{hook.activation}", where=where, fix="save it at strength 1, and give the strength at use")
    hook = hook.snapshot()
    for _, _, network in hook.networks():
        last = _weighted(network)[-1]
        for parameter in last.parameters():
            parameter.data = parameter.data * hook.strength
    hook.strength = 1.0
    return hook


def write_table(file: IO[bytes], table: Mapping[Any, Any]) -> None:
    """What `torch.save` writes, without the entries that came with torch 2.1 and later (byteorder, .format_version, …):
    A1111's check (modules/safe.py) refuses a file that has any but these. Equal content gives equal bytes."""
    buffer = io.BytesIO()
    torch.save(dict(table), buffer)
    with zipfile.ZipFile(buffer) as written, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in written.namelist():
            inside = name.partition("/")[2]
            if inside not in ("data.pkl", "version") and not inside.startswith("data/"):
                continue
            entry = zipfile.ZipInfo(name)
            # tensors begin at multiples of 64 bytes, as torch has it, so that they can be mapped
            at = file.tell() + 30 + len(name) + 4
            entry.extra = b"FB" + (-at % 64).to_bytes(2, "little") + b"\0" * (-at % 64)
            archive.writestr(entry, written.read(name))


# --- checks of a save --------------------------------------------------------------------------------------


def _check_meaning(meant: InputHook, saved: InputHook, dtype: torch.dtype) -> None:
    """What is about to be written has each network's weights, to the rounding of `dtype`."""
    info = torch.finfo(dtype)
    assert isinstance(meant, Hypernetwork) and isinstance(saved, Hypernetwork)
    assert (meant.widths, meant.structure, meant.activation, meant.layer_norm, meant.activate_output, meant.dropout) \
        == (saved.widths, saved.structure, saved.activation, saved.layer_norm, saved.activate_output, saved.dropout)
    for (width, name, one), (_, _, two) in zip(meant.networks(), saved.networks(), strict=True):
        pairs = zip(_weighted(one), _weighted(two), strict=True)
        for i, (a, b) in enumerate(pairs, 1):
            scale = meant.strength if i == len(_weighted(one)) else 1.0
            for x, y in zip(a.parameters(), b.parameters(), strict=True):
                x = x.detach().cpu().double() * scale
                close = (x - y.double()).abs() <= 2 * info.eps * x.abs() + 2 * info.tiny * info.eps
                assert close.all(), f"{width} {name} would be saved wrong"


def _same(one: Any, other: Any) -> bool:
    """Equal in every value, type and bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other
