"""The files of diffusers and peft: dotted paths, `lora_A` (down) and `lora_B` (up), alpha in a config.

- `Diffusers`: one file, `unet.{path}.lora_A.weight` …, the config as JSON in the metadata under
  `lora_adapter_metadata`, its keys prefixed by component, as diffusers' `save_lora_weights` writes it. Older
  spellings are read too (`processor.to_q_lora.up`, `lora_linear_layer.up`, `lora.up`). It holds LoRA and DoRA
  (`lora_magnitude_vector`).
- `PeftFolder`: `adapter_config.json` and `adapter_model.safetensors`, for one component. An adapter of
  several components is a folder of such folders, named after the components (`unet`, `text_encoder`). It holds one
  of LoRA, DoRA, LoHa (`hada_…`) and LoKr (`lokr_…`).

alpha: programs that look at the tensors alone take it to be the rank. So where alpha / rank is a power of two
it is multiplied into the factors, which changes exponents only. Any other stands in the config alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_folder
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.told import inner_of, is_plain_lora
from impasto.formats import names
from impasto.formats.adapter_bytes import Taken, read_back, read_tensors, stored, taken, upcast, write_tensors
from impasto.formats.adapters import Codec, FileCodec, Layers, assemble
from impasto.formats.header import Header, read_header
from impasto.formats.meaning import check_meaning
from impasto.formats.parts import TITLES, Held, Parts, as_lora, deltas_of, held, parts_of
from impasto.formats.peft_config import TYPES, config_of, fold, json_table, with_alpha

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: how a key ends: (pattern, what the layer's path ends with); the groups are q|k|v|out and the factor
ENDINGS = (
    (r"\.lora_(?P<factor>[AB])(?:\.(?P<adapter>\w+))?\.weight", ""),
    (r"\.processor\.to_(?P<which>q|k|v|out)_lora\.(?P<factor>up|down)\.weight", ".to_{which}"),
    (r"\.self_attn\.to_(?P<which>q|k|v|out)_lora\.(?P<factor>up|down)\.weight", ".self_attn.{which}_proj"),
    (r"\.to_(?P<which>q|k|v|out)_lora\.(?P<factor>up|down)\.weight", ".to_{which}"),
    (r"\.lora_linear_layer\.(?P<factor>up|down)\.weight", ""),
    (r"\.lora\.(?P<factor>up|down)\.weight", ""),
    (r"\.lora_(?P<factor>magnitude)_vector(?:\.(?P<adapter>(?!weight$)\w+))?(?:\.weight)?", ""),
    (r"\.(?P<factor>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.(?P<adapter>\w+))?", ""),
    (r"\.(?P<factor>alpha)", ""),
)
#: how a key names a factor -> the part that it is, see `formats.parts`
FACTORS = {"A": "lora.down", "B": "lora.up", "up": "lora.up", "down": "lora.down", "alpha": "alpha",
           "magnitude": "magnitude"}


class Diffusers(FileCodec):
    """One safetensors file as `load_lora_weights` of diffusers' pipelines takes it."""

    name = "diffusers"

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is not None and any(_ending(key) for key in header.tensors)

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path) -> Layers:
        config = json_table(metadata.get("lora_adapter_metadata", "{}"), "lora_adapter_metadata", where)
        layers = {}
        for (component, path), parts in _grouped(tensors, where).items():
            head = component + "."
            own = {key.removeprefix(head): value for key, value in config.items() if key.startswith(head)}
            layers[head + path] = _deltas(component, path, parts, own, where)
        return layers

    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, config = {}, {}
        for component, layers in _by_component(adapter, self.name, ("lora",), where).items():
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
        layers: Layers = {}
        metadata: dict[str, str] = {}
        for component, folder in _components(path).items():
            found, said = _load_folder(folder, component)
            layers |= found
            metadata |= said
        return assemble(layers, metadata)

    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> dict[str, tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]]:
        """Tensors, metadata and config of each component; a single one's folder is that of all."""
        encoded = {}
        for component, layers in _by_component(adapter, self.name, ("lora", "loha", "lokr"), where).items():
            tensors, config = _encode(component, layers, dtype, where)
            tensors = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
            encoded[component] = tensors, {**metadata, "format": "pt", "impasto.component": component}, config
        return encoded

    def sizes(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> dict[Path, Taken]:
        encoded, found = self.encode(adapter, dtype, metadata, path), {}
        for component, (tensors, said, config) in encoded.items():
            folder = path / component if len(encoded) > 1 else path
            found |= {folder / WEIGHTS: taken(tensors, said), folder / CONFIG: Taken(0, len(_written(config)))}
        return found

    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        encoded = self.encode(adapter, dtype, metadata, path)
        for component, (tensors, said, config) in encoded.items():
            decoded = _decode_folder(upcast(tensors), config, said, path, "")
            own = {k: v for k, v in adapter.deltas.items() if k.startswith(component + ".")}
            check_meaning(own, decoded, dtype)
        if path.exists():
            raise UserError("exists already", where=path, fix="remove it, or choose another name")
        with atomic_folder(path) as part:
            for component, (tensors, said, config) in encoded.items():
                folder = part / component if len(encoded) > 1 else part
                folder.mkdir(exist_ok=True)
                with open(folder / WEIGHTS, "wb") as file:
                    write_tensors(file, tensors, said)
                read_back(folder / WEIGHTS, tensors, said)
                (folder / CONFIG).write_bytes(_written(config))


# --- writing ---------------------------------------------------------------------------------------------


def _written(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()


def _by_component(adapter: Adapter, format: str, kinds: Collection[str], where: Path) -> dict[str, dict[str, Parts]]:
    """The parts of each layer by component and path. Raises `UserError` for what the format cannot hold."""
    found: dict[str, dict[str, Parts]] = {}
    for layer, terms in adapter.deltas.items():
        component, _, path = layer.partition(".")
        parts = parts_of(layer, _fitting(layer, held(layer, terms, where), format, kinds, where), where)
        if parts.get("magnitude", torch.zeros(2, 1)).shape[0] == 1 != terms[0].shape[0]:
            raise UserError(f"{layer} holds a DoRA with a magnitude for each input, and peft's have one for each "
                            "output", where=where, fix="save it as kohya")
        found.setdefault(component, {})[path] = parts
    return found


def _fitting(layer: str, content: Held, format: str, kinds: Collection[str], where: Path) -> Held:
    """A change of a kind that the format has, the same up to rounding; a Tucker core multiplied into its factor."""
    change = content.change
    if content.bias is not None:
        raise UserError(f"{layer} holds a change of a bias, which a {format} file cannot hold", where=where,
                        fix="save it as kohya")
    assert change is not None
    if change.kind in kinds and change.kind != "lora":
        return content
    inner = inner_of(change)
    if change.kind == "dora":
        lora = change if is_plain_lora(inner) else None
    else:
        lora = as_lora(change) if change.kind == "lora" else None
    if lora is None:
        what = TITLES[inner.kind] + (" with a Tucker core" if inner.kind == "lora" else "") + (
            " under DoRA" if change.kind == "dora" else "")
        others = "kohya or peft" if format == "diffusers" and change.kind in ("loha", "lokr") else "kohya"
        raise UserError(f"{layer} holds {what}, which a {format} file cannot hold", where=where,
                        fix=f"save it as {others}")
    return Held(lora, None)


def _encode(component: str, layers: Mapping[str, Parts], dtype: torch.dtype, where: Path
            ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A component's tensors and peft's config of them."""
    layers = {path: fold(parts, dtype) if "lora.up" in parts else parts for path, parts in layers.items()}
    tensors = {}
    for path, parts in layers.items():
        for part, tensor in parts.items():
            if part == "magnitude":  # (out), or (1, out, 1, 1) of a convolution
                tensor = tensor.transpose(0, 1) if tensor.ndim > 2 else tensor[:, 0]
            if part != "alpha":
                tensors[f"{path}.{SPELLINGS[part]}"] = stored(f"{component}.{path}", tensor, dtype, where)
    return tensors, config_of(component, layers, where)


#: part -> what follows a layer's path
SPELLINGS = {"lora.down": "lora_A.weight", "lora.up": "lora_B.weight", "magnitude": "lora_magnitude_vector",
             **{f"loha.{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
             **{f"lokr.{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}}


# --- reading ---------------------------------------------------------------------------------------------


def _components(path: Path) -> dict[str, Path]:
    """Component -> its peft folder; "" where the folder itself is one, and its keys have to tell."""
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return {"": path}
    return {name: path / name for name in names.COMPONENTS
            if (path / name / CONFIG).is_file() and (path / name / WEIGHTS).is_file()}


def _load_folder(folder: Path, component: str) -> tuple[Layers, dict[str, str]]:
    header = read_header(folder / WEIGHTS)
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError("cannot be read", where=folder / CONFIG) from None
    config = json_table(text, "it", folder / CONFIG)
    if config.get("peft_type", "LORA") not in TYPES:
        raise UserError(f"peft_type {config['peft_type']!r} is not known, only {', '.join(TYPES)}",
                        where=folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS, header)
    return _decode_folder(tensors, config, header.metadata, folder / WEIGHTS, component), header.metadata


def _decode_folder(tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str],
                   where: Path, component: str) -> Layers:
    component = component or metadata.get("impasto.component", "")
    return {f"{c}.{path}": _deltas(c, path, parts, config, where)
            for (c, path), parts in _grouped(tensors, where, component).items()}


def _grouped(tensors: Mapping[str, Tensor], where: Path, component: str = ""
             ) -> dict[tuple[str, str], Parts]:
    """(component, canonical path) -> its parts."""
    found: dict[tuple[str, str], Parts] = {}
    adapters = set()
    for key, tensor in tensors.items():
        ending = _ending(key)
        if ending is None:
            raise UserError(f"key {key!r} is not of diffusers' or peft's formats", where=where)
        layer, factor, adapter = ending
        place = _place(layer, component, key, where)
        adapters.add(adapter)
        if factor in found.setdefault(place, {}):
            raise UserError(f"{'.'.join(place)} has two tensors for its {factor.rpartition('.')[2]}", where=where)
        found[place][factor] = tensor
    if len(adapters - {None}) > 1:
        raise UserError(f"holds several adapters ({', '.join(sorted(a for a in adapters if a))})",
                        where=where, fix="save them one by one")
    return found


def _ending(key: str) -> tuple[str, str, str | None] | None:
    """A key as (layer, part, name of the adapter inside it if any), or None if it is none of ours."""
    for pattern, tail in ENDINGS:
        if match := re.search(pattern + "$", key):
            said = match.groupdict()
            layer = key[:match.start()] + tail.format(which=said.get("which"))
            adapter = said.get("adapter")
            factor = said["factor"].replace("hada_", "loha.").replace("lokr_", "lokr.")
            return layer, FACTORS.get(factor, factor), adapter
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


def _deltas(component: str, path: str, parts: Parts, config: Mapping[str, Any], where: Path) -> tuple[Delta, ...]:
    """The deltas of a layer, with what the config says of it."""
    layer = f"{component}.{path}"
    if "magnitude" in parts and parts["magnitude"].ndim > 2:  # peft has (1, out, 1, 1) of a convolution
        parts = parts | {"magnitude": parts["magnitude"].transpose(0, 1)}
    parts = with_alpha(component, path, parts, config, where)
    if config.get("use_dora") and "magnitude" not in parts:
        raise UserError(f"{layer} lacks its magnitude, and its config says use_dora", where=where)
    return deltas_of(layer, parts, where, names.kernel(layer))
