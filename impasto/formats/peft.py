"""The LoRA files of diffusers and peft: dotted paths, `lora_A` (down) and `lora_B` (up), alpha in a config.

- `Diffusers`: one file, `unet.{path}.lora_A.weight` …, the config as JSON in the metadata under
  `lora_adapter_metadata`, its keys prefixed by component, as diffusers' `save_lora_weights` writes it. Older
  spellings are read too (`processor.to_q_lora.up`, `lora_linear_layer.up`, `lora.up`).
- `PeftFolder`: `adapter_config.json` and `adapter_model.safetensors`, for one component. An adapter of
  several components is a folder of such folders, named after the components (`unet`, `text_encoder`).

alpha: programs that look at the tensors alone take it to be the rank. So where alpha / rank is a power of two
it is multiplied into the factors, which changes exponents only. Any other stands in the config alone.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_folder
from impasto.deltas.adapter import Adapter
from impasto.formats import names
from impasto.formats.adapters import (
    Codec,
    Factors,
    FileCodec,
    assemble,
    check_meaning,
    factors_of,
    pair,
    read_back,
    read_tensors,
    stored,
    upcast,
    write_tensors,
)
from impasto.formats.header import Header, read_header

#: no one means more; a number from a file may have any size
MAX_ALPHA = 1e9

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: how a key ends: (pattern, what the layer's path ends with); the groups are q|k|v|out and the factor
ENDINGS = (
    (r"\.lora_(?P<factor>[AB])(?:\.(?P<adapter>\w+))?\.weight", ""),
    (r"\.processor\.to_(?P<which>q|k|v|out)_lora\.(?P<factor>up|down)\.weight", ".to_{which}"),
    (r"\.self_attn\.to_(?P<which>q|k|v|out)_lora\.(?P<factor>up|down)\.weight", ".self_attn.{which}_proj"),
    (r"\.to_(?P<which>q|k|v|out)_lora\.(?P<factor>up|down)\.weight", ".to_{which}"),
    (r"\.lora_linear_layer\.(?P<factor>up|down)\.weight", ""),
    (r"\.lora\.(?P<factor>up|down)\.weight", ""),
    (r"\.(?P<factor>alpha)", ""),
)
FACTORS = {"A": "down", "B": "up", "up": "up", "down": "down", "alpha": "alpha"}


class Diffusers(FileCodec):
    """One safetensors file as `load_lora_weights` of diffusers' pipelines takes it."""

    name = "diffusers"

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is not None and any(_ending(key) for key in header.tensors)

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path
               ) -> dict[str, Factors]:
        config = _json_table(metadata.get("lora_adapter_metadata", "{}"), "lora_adapter_metadata", where)
        layers = {}
        for (component, path), parts in _grouped(tensors, where).items():
            head = component + "."
            own = {key.removeprefix(head): value for key, value in config.items() if key.startswith(head)}
            layers[head + path] = _with_config(component, path, parts, own, where)
        return layers

    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, config = {}, {}
        for component, layers in _by_component(adapter, self.name, where).items():
            part, own = _encode(component, layers, dtype, where)
            tensors |= {f"{component}.{key}": tensor for key, tensor in part.items()}
            config |= {f"{component}.{key}": value for key, value in own.items()}
        said = {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
        return tensors, {**metadata, **said}


class PeftFolder(Codec):
    """What peft's `save_pretrained` writes and `from_pretrained` reads."""

    name = "peft"

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is None and bool(_components(path))

    def load(self, path: Path, header: Header | None) -> Adapter:
        layers: dict[str, Factors] = {}
        metadata: dict[str, str] = {}
        for component, folder in _components(path).items():
            found, said = _load_folder(folder, component)
            layers |= found
            metadata |= said
        return assemble(layers, metadata)

    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        parts = _by_component(adapter, self.name, path)
        encoded = {}
        for component, layers in parts.items():
            tensors, config = _encode(component, layers, dtype, path)
            tensors = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
            said = {**metadata, "format": "pt", "impasto.component": component}
            decoded = _decode_folder(upcast(tensors), config, said, path, "")
            own = {k: v for k, v in adapter.deltas.items() if k.startswith(component + ".")}
            check_meaning(replace(adapter, deltas=own), decoded, dtype)
            encoded[component] = tensors, said, config
        if path.exists():
            raise UserError("exists already", where=path, fix="remove it, or choose another name")
        with atomic_folder(path) as part:
            for component, (tensors, said, config) in encoded.items():
                folder = part / component if len(encoded) > 1 else part
                folder.mkdir(exist_ok=True)
                with open(folder / WEIGHTS, "wb") as file:
                    write_tensors(file, tensors, said)
                read_back(folder / WEIGHTS, tensors, said)
                text = json.dumps(config, indent=1, sort_keys=True) + "\n"
                (folder / CONFIG).write_text(text, encoding="utf-8")


# --- writing ---------------------------------------------------------------------------------------------


def _by_component(adapter: Adapter, format: str, where: Path) -> dict[str, dict[str, Factors]]:
    parts: dict[str, dict[str, Factors]] = {}
    for layer, terms in adapter.deltas.items():
        component, _, path = layer.partition(".")
        parts.setdefault(component, {})[path] = factors_of(layer, terms, format, where)
    return parts


def _encode(component: str, layers: Mapping[str, Factors], dtype: torch.dtype, where: Path
            ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A component's tensors and peft's config (`LoraConfig`) of them.

    Patterns in the config leave `text_model.` out: they are matched against the end of a module's path, which
    has it or not with the version of transformers.
    """
    tensors, ranks, alphas = {}, {}, {}
    for path, factors in layers.items():
        factors = _fold(factors, dtype)
        tensors[f"{path}.lora_A.weight"] = stored(f"{component}.{path}", factors.down, dtype, where)
        tensors[f"{path}.lora_B.weight"] = stored(f"{component}.{path}", factors.up, dtype, where)
        module = path.removeprefix("text_model.")
        ranks[module], alphas[module] = factors.rank, _whole(factors.alpha)
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    return tensors, {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "use_rslora": False, "use_dora": False, "bias": "none", "lora_dropout": 0.0,
    }


def _fold(factors: Factors, dtype: torch.dtype) -> Factors:
    """alpha made equal to the rank, if alpha / rank is a power of two and `dtype` has room for it.

    Room: what drops below the smallest numbers of `dtype` is less than 1e-5 of each factor's norm, a fiftieth
    of fp16's own rounding.
    """
    mantissa, exponent = math.frexp(factors.alpha / factors.rank)
    if mantissa != 0.5 or exponent == 1:
        return factors
    half = (exponent - 1) // 2
    shifts = half, exponent - 1 - half
    for old, shift in zip((factors.down, factors.up), shifts, strict=True):
        stays = (old * 2.0**shift).to(dtype).float() / 2.0**shift
        if not (stays - old.to(dtype).float()).norm() <= 1e-5 * old.norm():
            return factors
    return Factors(factors.up * 2.0**shifts[1], factors.down * 2.0**shifts[0], float(factors.rank))


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


# --- reading ---------------------------------------------------------------------------------------------


def _components(path: Path) -> dict[str, Path]:
    """Component -> its peft folder; "" where the folder itself is one, and its keys have to tell."""
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return {"": path}
    return {name: path / name for name in names.COMPONENTS
            if (path / name / CONFIG).is_file() and (path / name / WEIGHTS).is_file()}


def _load_folder(folder: Path, component: str) -> tuple[dict[str, Factors], dict[str, str]]:
    header = read_header(folder / WEIGHTS)
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError("cannot be read", where=folder / CONFIG) from None
    config = _json_table(text, "it", folder / CONFIG)
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"peft_type {config['peft_type']!r} is not supported yet, only LORA",
                        where=folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS, header)
    return _decode_folder(tensors, config, header.metadata, folder / WEIGHTS, component), header.metadata


def _decode_folder(tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str],
                   where: Path, component: str) -> dict[str, Factors]:
    component = component or metadata.get("impasto.component", "")
    return {f"{c}.{path}": _with_config(c, path, parts, config, where)
            for (c, path), parts in _grouped(tensors, where, component).items()}


def _grouped(tensors: Mapping[str, Tensor], where: Path, component: str = ""
             ) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(component, canonical path) -> up, down, alpha."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    adapters = set()
    for key, tensor in tensors.items():
        ending = _ending(key)
        if ending is None:
            raise UserError(f"key {key!r} is not of diffusers' or peft's LoRA formats", where=where)
        layer, factor, adapter = ending
        place = _place(layer, component, key, where)
        adapters.add(adapter)
        if factor in found.setdefault(place, {}):
            raise UserError(f"{'.'.join(place)} has two tensors for its {factor}", where=where)
        found[place][factor] = tensor
    if len(adapters - {None}) > 1:
        raise UserError(f"holds several adapters ({', '.join(sorted(a for a in adapters if a))})",
                        where=where, fix="save them one by one")
    return found


def _ending(key: str) -> tuple[str, str, str | None] | None:
    """A key as (layer, factor, name of the adapter inside it if any), or None if it is none of ours."""
    for pattern, tail in ENDINGS:
        if match := re.search(pattern + "$", key):
            said = match.groupdict()
            layer = key[:match.start()] + tail.format(which=said.get("which"))
            adapter = said.get("adapter") if said["factor"] != "alpha" else None
            return layer, FACTORS[said["factor"]], adapter
    return None


def _place(layer: str, component: str, key: str, where: Path) -> tuple[str, str]:
    """The component and canonical path of a layer as a key spells it."""
    bare = layer.replace("base_model.model.", "")
    first, _, rest = bare.partition(".")
    if not component and first in names.COMPONENTS:
        component, bare = first, rest
    if bare.endswith(".to_out"):
        bare += ".0"  # older diffusers files leave the index out
    for candidate in (component,) if component else names.COMPONENTS:
        try:
            return candidate, names.canonical(candidate, bare)
        except UserError:
            continue
    raise UserError(f"key {key!r} names no layer of a {component or 'known component'}", where=where)


def _with_config(component: str, path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any],
                 where: Path) -> Factors:
    """Factors with the alpha that the config gives the layer, if the file's tensors do not have one."""
    layer = f"{component}.{path}"
    factors = pair(layer, parts.get("up"), parts.get("down"), parts.get("alpha"), where)
    for unsupported in ("use_dora", "fan_in_fan_out", "use_qalora"):
        if config.get(unsupported):
            raise UserError(f"its config says {unsupported}, which is not supported yet", where=where)
    if "alpha" in parts or "lora_alpha" not in config:
        return factors
    table = config.get("alpha_pattern") or {}
    if not isinstance(table, dict):
        raise UserError("alpha_pattern in its config is not a table", where=where)
    fitting = (value for pattern, value in table.items() if _matches(pattern, path, where))
    alpha = next(fitting, config["lora_alpha"])
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
        raise UserError(f"its config gives {layer} the alpha {str(alpha)[:40]!r}", where=where)
    if config.get("use_rslora"):  # peft divides by √rank then, and this alpha is divided by the rank
        alpha *= math.sqrt(factors.rank)
    return factors._replace(alpha=float(alpha))


def _matches(pattern: str, path: str, where: Path) -> bool:
    """peft's rule: a pattern is a regular expression for the path's end, from its start or after a dot."""
    if len(re.findall(r"[*+?{]", pattern)) > 4 or re.search(r"\)[*+?{]", pattern):
        raise UserError(f"alpha_pattern {pattern!r} is too intricate to be matched safely", where=where)
    try:
        expression = re.compile(rf"(.*\.)?({pattern})")
    except re.error:
        raise UserError(f"alpha_pattern {pattern!r} is not a regular expression", where=where) from None
    # a pattern may have been written for a text encoder with `text_model.` in its paths, or without
    return any(expression.fullmatch(p) for p in {path, path.removeprefix("text_model.")})


def _json_table(text: str, what: str, where: Path) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise UserError(f"{what} is not a table in JSON", where=where)
    return table
