"""Layers of SD 3's network (MMDiT) in the names of its authors' own code, which kohya's files and ComfyUI's use.

There an attention's queries, keys and values are one layer, `qkv`, and diffusers has three. Two layers give the shift
and the scale of a norm, in this order, where diffusers has them the other way round: that of the last norm, and that of
the text's last block, which is told from the others by its two outputs for each input, not six. The names follow from
the network's walk, `mmdit_entries`.

Checked against src/diffusers/loaders/single_file_utils.py of github.com/huggingface/diffusers
(`convert_sd3_transformer_checkpoint_to_diffusers`), comfy/utils.py of github.com/Comfy-Org/ComfyUI
(`mmdit_to_diffusers`), and library/sd3_models.py of github.com/kohya-ss/sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.delta import Delta
from impasto.deltas.rows import below, is_zero, taken
from impasto.formats.mmdit import mmdit_entries
from impasto.formats.names import flatten
from impasto.formats.parts import Held

#: a small network of which every kind of layer is part: the first block has a second attention, the second is the last
_ALL = {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm", **dict.fromkeys((
    "num_attention_heads", "attention_head_dim", "caption_projection_dim", "joint_attention_dim",
    "pooled_projection_dim", "in_channels", "out_channels", "patch_size", "pos_embed_max_size"), 1)}
#: how original paths begin, flat or with dots
BEGINNINGS = ("joint_blocks", "x_embedder", "t_embedder", "y_embedder", "context_embedder", "final_layer")

_BLOCK = re.compile(r"(?<=_blocks[._])\d+")


def _blotted(path: str) -> tuple[str, str]:
    """The path with `#` for its block's number, and the number."""
    match = _BLOCK.search(path)
    return (path[:match.start()] + "#" + path[match.end():], match[0]) if match else (path, "")


def _walked() -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """By original path: the one in diffusers' names, or those of queries, keys and values; and the originals of a shift
    and a scale. `#` is a block's number."""
    paths: dict[str, dict[int, str]] = {}
    swapped = set()
    for entry in mmdit_entries(_ALL):
        if entry.name.endswith(".weight"):
            name, own = (_blotted(each.removesuffix(".weight"))[0] for each in (entry.name, entry.ldm))
            paths.setdefault(own, {})[entry.piece[0]] = name
            if entry.how == "halves":
                swapped.add(own)
    return {own: tuple(found.values()) for own, found in paths.items()}, frozenset(swapped)


PATHS, SWAPPED = _walked()
_ORIGINALS = {**{path: path for path in PATHS}, **{flatten(path): path for path in PATHS}}
#: path in diffusers' names -> the original one, and the place in it
_PLACES = {path: (original, i) for original, paths in PATHS.items() for i, path in enumerate(paths)}


def original(name: str) -> str:
    """The original path that a flat or dotted name means; "" if it means none."""
    template, number = _blotted(name)
    return _numbered(_ORIGINALS[template], number) if template in _ORIGINALS else ""


def parts(path: str) -> tuple[str, ...]:
    """The layers, in diffusers' names, that the layer at an original path is: one, or three."""
    template, number = _blotted(path)
    return tuple(_numbered(part, number) for part in PATHS[template])


def _numbered(template: str, number: str) -> str:
    return template.replace("#", number)


# --- changes of layers -------------------------------------------------------------------------------------


def split(path: str, terms: tuple[Delta, ...], where: object = "") -> dict[str, tuple[Delta, ...]]:
    """The changes of diffusers' layers that changes of the layer at an original path mean.

    Of queries, keys and values those that are not changed, beside one that is, are left out.
    """
    first, *others = parts(path)
    try:
        if others:
            found = {name: tuple(taken(term, [i], 3) for term in terms) for i, name in enumerate((first, *others))}
            changed = {name: kept for name, of in found.items() if (kept := tuple(t for t in of if not is_zero(t)))}
            return changed or found
        if _swaps(path, [term.shape for term in terms]):
            terms = tuple(taken(term, [1, 0], 2) for term in terms)
    except UserError as error:
        raise UserError(f"transformer.{path}: {error.what}", where=where) from None
    return {first: terms}


def joined(contents: Mapping[str, Held], where: object = "") -> dict[str, Held]:
    """What a file holds of the layers of an adapter, with the transformer's under their original paths."""
    made: dict[str, Held] = {}
    places: dict[str, dict[int, Held]] = {}
    for layer, held in contents.items():
        component, _, path = layer.partition(".")
        if component == "transformer":
            template, number = _blotted(path)
            whole, place = _PLACES[template]
            places.setdefault(_numbered(whole, number), {})[place] = held
        else:
            made[layer] = held
    for path, those in places.items():
        try:
            made[f"transformer.{path}"] = _one(path, those)
        except UserError as error:
            raise UserError(f"transformer.{path}: {error.what}", where=where, fix=FIX) from None
    return made


#: what to do with changes that cannot be in the original layers
FIX = "save it as diffusers or peft, whose layers are these"


def _one(path: str, those: Mapping[int, Held]) -> Held:
    number = len(parts(path))
    if number > 1:
        content = [those.get(i, Held(None, None)) for i in range(number)]
        change = below([held.change for held in content]) if any(held.change is not None for held in content) else None
        return Held(change, _biases([held.bias for held in content]))
    (change, bias), = those.values()
    if _swaps(path, [() if change is None else change.shape]):
        change = None if change is None else taken(change, [1, 0], 2)
        bias = None if bias is None else torch.cat(bias.chunk(2)[::-1])
    return Held(change, bias)


def _biases(biases: list[Tensor | None]) -> Tensor | None:
    like = next((bias for bias in biases if bias is not None), None)
    return None if like is None else torch.cat([torch.zeros_like(like) if bias is None else bias for bias in biases])


def _swaps(path: str, shapes: list[tuple[int, ...]]) -> bool:
    """Whether the layer's two halves stand the other way round in diffusers."""
    template, number = _blotted(path)
    if template not in SWAPPED or not number:  # the last norm is not of a block
        return template in SWAPPED
    shape = next((shape for shape in shapes if shape), None)
    if shape is None:
        raise UserError("a change of its bias alone does not tell whether this is the last block, whose halves are the "
                        "other way round")
    return shape[0] == 2 * shape[1]


def variant(inputs: Mapping[str, int]) -> str:
    """Which SD 3 it is, as kohya calls them, as far as layers and their numbers of inputs tell: "5-large" (38 blocks of
    64 · 38 channels), "5-medium" (a second attention), "" for either "medium"."""
    if any(".attn2." in layer for layer in inputs):
        return "5-medium"
    large = any(layer.endswith(".qkv") and width == 2432 for layer, width in inputs.items())
    return "5-large" if large or any(_number(layer) > 23 for layer in inputs) else ""


def _number(layer: str) -> int:
    return int(_blotted(layer)[1] or 0)
