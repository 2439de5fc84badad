"""kohya's adapter file, which every program reads: `lora_unet_…` keys, alpha beside them, `ss_*` metadata.

After a layer's name: `.lora_up.weight` (out, r[, 1, 1]), `.lora_down.weight` (r, in[, k, k]), `.alpha`, as
networks/lora.py and, for SD 3, networks/lora_sd3.py of github.com/kohya-ss/sd-scripts have it; and what LyCORIS adds to
them, modules/*.py of github.com/KohakuBlueleaf/LyCORIS: `.lora_mid.weight`, `.hada_…` (LoHa), `.lokr_…` (LoKr), `.diff`
and `.diff_b` (full), `.w_norm` and `.b_norm` (of a norm), `.dora_scale` (DoRA). The names of the layers are diffusers',
flat; those of SDXL and SD 3 their authors' own. One file may mix kinds, one for each layer.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.kronecker import factorization
from impasto.formats import mmdit_layers, names, original
from impasto.formats.adapter_bytes import layout, read_tensors, stored, tensor_bytes
from impasto.formats.adapters import FileCodec, Layers, assemble, family_of
from impasto.formats.checkpoint import WORDS
from impasto.formats.configs import CONFIGS
from impasto.formats.embeddings import BUNDLE, bundled, family_by_width, unbundled
from impasto.formats.header import Header, header_bytes
from impasto.formats.kronecker_split import factor_of, split_of
from impasto.formats.parts import FORMS, Held, Parts, deltas_of, held, parts_of, rank_in

#: what a layer's name begins with -> the components that it may be in
PREFIXES = {
    "lora_unet_": ("unet",), "lora_te_": ("text_encoder",), "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",), "lora_te3_": ("text_encoder_3",),
    # OneTrainer, of SD 3 in diffusers' names
    "lora_transformer_": ("transformer",),
    # LyCORIS' own wrapper, around whatever network; SimpleTuner
    "lycoris_unet_": ("unet",), "lycoris_": ("unet", "text_encoder", "transformer"),
}

#: family -> its only text encoder, which bears another's number in diffusers and none in ComfyUI and Forge, its
#: projection apart
LONE = {"sdxl-refiner": "text_encoder_2"}

#: part of a layer's change -> what follows the layer's name
SUFFIXES = {
    "lora.up": "lora_up.weight", "lora.down": "lora_down.weight", "lora.mid": "lora_mid.weight",
    **{f"loha.{name}": f"hada_{name}" for name in FORMS["loha"][1]},
    **{f"lokr.{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "dense.weight": "diff", "dense.bias": "diff_b", "magnitude": "dora_scale", "alpha": "alpha",
}
#: of norms, which LyCORIS calls otherwise; and it does not read the other names there
NORMS = {"dense.weight": "w_norm", "dense.bias": "b_norm"}
PARTS = {suffix: part for table in (SUFFIXES, NORMS) for part, suffix in table.items()}

#: how the parts begin in relatives of this format that are not known here
FOREIGN = {
    "oft_": "an OFT block", "lokr_t1": "a Tucker core of a LoKr's first factor", "a1.": "of GLoRA", "a2.": "of GLoRA",
    "b1.": "of GLoRA", "b2.": "of GLoRA", "on_input": "of (IA)³", "set_weight": "a weight to be put in its place",
}

#: kind of delta -> LyCORIS' name of it
ALGORITHMS = {"lora": "locon", "loha": "loha", "lokr": "lokr", "dense": "full"}

#: family -> `ss_base_model_version`, `modelspec.architecture` without "/lora", `modelspec.resolution`; of SD 3 the
#: variant stands in place of the first and behind the second, where it is known (library/sai_model_spec.py)
FAMILIES = {
    "sd1": ("sd_v1", "stable-diffusion-v1", "512x512"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512", "512x512"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024"),
    "sd3": ("sd3", "stable-diffusion-3", "1024x1024"),
}

#: family -> kohya's module for LoRA, where it is not `networks.lora`
NETWORKS = {"sd3": "networks.lora_sd3"}


class KohyaParts(FileCodec):
    """A format of these parts, and of new tokens' `bundle_emb.…` beside them, whatever it calls a layer."""

    holds = frozenset({"deltas", "embeddings"})

    @abc.abstractmethod
    def parse(self, key: str, where: Path) -> tuple[str, str]:
        """A file's key as (layer path, part of it); a layer of SD 3's network has its original path, if it is by that.
        """

    @abc.abstractmethod
    def spell(self, layer: str, family: str, where: Path) -> str:
        """What stands before the part, of a layer as `layers` has it."""

    def layers(self, contents: Mapping[str, Held], where: Path) -> dict[str, Held]:
        """What the file holds by layer, as it divides a network into layers."""
        return mmdit_layers.joined(contents, where)

    def load(self, path: Path, header: Header | None) -> Adapter:
        assert header is not None
        tensors = read_tensors(path, header)
        adapter = assemble(self.decode(tensors, header.metadata, path), header.metadata)
        adapter.embeddings = unbundled(tensors, path)
        adapter.family = adapter.family or family_by_width(adapter.embeddings)
        return adapter

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path) -> Layers:
        found: dict[str, Parts] = {}
        for key, tensor in tensors.items():
            if key.startswith(BUNDLE):  # no layer's: see `load`
                continue
            layer, part = self.parse(key, where)
            if part in found.setdefault(layer, {}):
                raise UserError(f"{layer} has two tensors for its {part.rpartition('.')[2]}", where=where)
            found[layer][part] = tensor
        family = family_of({layer: _inputs(parts) for layer, parts in found.items()}, metadata)
        layers: Layers = {}
        for layer, parts in found.items():
            layer = _numbered(layer, family)
            for name, terms in _changes(layer, _turned(layer, parts), family, where).items():
                if name in layers:
                    raise UserError(f"{name} is there twice, by itself and in another layer", where=where)
                layers[name] = terms
        return layers

    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        contents = {layer: held(layer, terms, where) for layer, terms in adapter.deltas.items()}
        family = adapter.family or family_of({layer: terms[0].shape[1] for layer, terms in adapter.deltas.items()
                                              if len(terms[0].shape) > 1}, {})
        layers = {layer: _turned(layer, parts_of(layer, content, where))
                  for layer, content in self.layers(contents, where).items()}
        tensors = bundled(adapter.embeddings, dtype, where)
        for layer, parts in layers.items():
            norm, name = names.is_norm(layer), self.spell(layer, family, where)
            suffixes = SUFFIXES | NORMS if norm else SUFFIXES
            for part, tensor in (_both(parts) if norm and names.has_bias(layer) else parts).items():
                # kohya rounds alpha to the file's type; 3.3 in fp16 would change the layer's strength
                tensors[f"{name}.{suffixes[part]}"] = tensor.float() if part == "alpha" else \
                    stored(layer, tensor, dtype, where)
        told = _dimensions(layers) if layers else {}
        return tensors, {**describe(layers, family, where.stem), **metadata, **told}


class Kohya(KohyaParts):
    """One safetensors file of `lora_unet_…` and `lora_te…` keys."""

    name = "kohya"

    def claims(self, path: Path, header: Header | None) -> bool:
        if header is None:
            return False
        return any(key.startswith(tuple(PREFIXES)) for key in header.tensors) or \
            bool(header.tensors) and all(key.startswith(BUNDLE) for key in header.tensors)

    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, metadata = super().encode(adapter, dtype, metadata, where)
        return tensors, {**metadata, **hashes(tensors, metadata)}

    def parse(self, key: str, where: Path) -> tuple[str, str]:
        return parsed(key, where)

    def spell(self, layer: str, family: str, where: Path) -> str:
        """`unet.conv_in` -> `lora_unet_conv_in`, of SDXL as its authors call it, `lora_unet_input_blocks_0_0`."""
        component, _, path = layer.partition(".")
        if component == "unet" and family in original.SDXL and path in original.originals(family):
            path = original.originals(family)[path]
        return prefix_of(component, family, path) + names.flatten(path)


# --- layers ------------------------------------------------------------------------------------------------


def _numbered(layer: str, family: str) -> str:
    """The layer as diffusers calls it, of a family's only text encoder."""
    component, _, path = layer.partition(".")
    return f"{LONE[family]}.{path}" if component == "text_encoder" and family in LONE else layer


def _changes(layer: str, parts: Parts, family: str, where: Path) -> Layers:
    """The deltas that the parts of one of a file's layers make, by the layers that diffusers has for it."""
    component, _, path = layer.partition(".")
    if component != "transformer" or not mmdit_layers.original(path):
        return {layer: deltas_of(layer, parts, where, names.kernel(layer, family))}
    kernel = names.kernel(f"transformer.{mmdit_layers.parts(path)[0]}")
    changes = mmdit_layers.split(path, deltas_of(layer, parts, where, kernel), where)
    return {f"transformer.{name}": terms for name, terms in changes.items()}


def _turned(layer: str, parts: Parts) -> Parts:
    """A table's change as the file has it, or back: in its own orientation, which is its linear map's transpose."""
    if names.is_embedding(layer) and "dense.weight" in parts:
        return parts | {"dense.weight": parts["dense.weight"].T}
    return parts


def _both(parts: Parts) -> Parts:
    """Of a norm both parts: A1111 takes no file that has one alone."""
    (like, *_) = parts.values()
    return {part: parts.get(part, torch.zeros_like(like)) for part in NORMS}


def _inputs(parts: Parts) -> int:
    """How many inputs the layer of these parts has; 0 where they do not tell at once."""
    tensor = parts.get("lora.down", parts.get("loha.w1_b", parts.get("dense.weight")))
    if tensor is not None and tensor.ndim > 1:
        return tensor.shape[1]
    first, second = (parts.get(f"lokr.{w}", parts.get(f"lokr.{w}_b")) for w in ("w1", "w2"))
    if first is None or second is None or first.ndim < 2 or second.ndim < 2:
        return 0
    return first.shape[1] * second.shape[1]


# --- metadata ----------------------------------------------------------------------------------------------


def describe(layers: Mapping[str, Parts], family: str, title: str) -> dict[str, str]:
    """The metadata that other programs show or ask for, where the caller says nothing else.

    "/lora" stands behind the architecture whatever the kind: so kohya's train_network.py says of LyCORIS' files too.
    """
    module = NETWORKS.get(family, "networks.lora") if _plain(layers) else "lycoris.kohya"
    kind = {"ss_network_module": module, "modelspec.sai_model_spec": "1.0.1", "modelspec.title": title,
            "modelspec.implementation": "diffusers"}
    usual = CONFIGS.get(family).scheduler if family in CONFIGS else {"prediction_type": "epsilon"}
    if told := usual.get("prediction_type"):  # SD 2 has networks of two kinds, SD 3 predicts a flow
        kind["modelspec.prediction_type"] = WORDS[told]
    if family in FAMILIES:
        version, architecture, resolution = FAMILIES[family]
        inputs = {layer: _inputs(parts) for layer, parts in layers.items()}
        if family == "sd3" and (variant := mmdit_layers.variant(inputs)):
            version, architecture = variant, f"{architecture}-{variant}"
        kind |= {"ss_base_model_version": version, "ss_v2": str(family == "sd2"),
                 "modelspec.architecture": f"{architecture}/lora", "modelspec.resolution": resolution}
    return kind


def _plain(layers: Mapping[str, Parts]) -> bool:
    """Whether kohya's own networks.lora reads all of it."""
    return all(parts.keys() == {"lora.up", "lora.down", "alpha"} for parts in layers.values())


def _dimensions(layers: Mapping[str, Parts]) -> dict[str, str]:
    """`ss_network_dim`, `_alpha`, and `_args`: what kohya's and LyCORIS' trainers were given, as strings."""

    def common(values: Iterable[float]) -> str:
        different = set(values)
        return f"{different.pop():g}" if len(different) == 1 else "Dynamic"

    sizes = {layer: (rank, float(parts["alpha"])) for layer, parts in layers.items() if (rank := rank_in(parts))}
    wide = [size for layer, size in sizes.items() if _is_wide(layers[layer])]
    main = [size for layer, size in sizes.items() if not _is_wide(layers[layer])] or wide
    args = {"conv_dim": common(r for r, _ in wide), "conv_alpha": common(a for _, a in wide)} if wide else {}
    if not _plain(layers):
        args = _algorithm(layers) | args
    told = {"ss_network_args": json.dumps(args)}
    if main:
        told |= {"ss_network_dim": common(r for r, _ in main), "ss_network_alpha": common(a for _, a in main)}
    return told


def _is_wide(parts: Parts) -> bool:
    """Whether these are factors of a convolution of more than 1×1, as far as they show it (kohya's `conv_dim`)."""
    return any(tensor[0, 0].numel() > 1 for part, tensor in parts.items()
               if part in ("lora.down", "lora.mid", "loha.t1", "lokr.t2", "lokr.w2") and tensor.ndim > 2)


def _algorithm(layers: Mapping[str, Parts]) -> dict[str, str]:
    """LyCORIS' words for what most layers hold."""
    kinds = Counter(max(part.partition(".")[0] for part in parts if "." in part) for parts in layers.values())
    algorithm = ALGORITHMS[kinds.most_common(1)[0][0]]  # beside a "dense" bias another kind comes last in the alphabet
    args = {"algo": algorithm}
    if any(part in parts for parts in layers.values() for part in ("lora.mid", "loha.t1", "lokr.t2")):
        args["use_tucker"] = "True"
    if any("magnitude" in parts for parts in layers.values()):
        args["dora_wd"] = "True"
        args["wd_on_output"] = str(all(parts["magnitude"].shape[0] > 1 for parts in layers.values()
                                       if "magnitude" in parts))
    if algorithm == "lokr":
        splits = [split_of(layer, parts) for layer, parts in layers.items() if {"lokr.w1", "lokr.w1_a"} & parts.keys()]
        if (factor := factor_of(splits, factorization)) is not None:
            args["factor"] = str(factor)
        args |= {"decompose_both": "True"} if any("lokr.w1_a" in parts for parts in layers.values()) else {}
    return args


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which the web UIs and model sites know a file, as kohya's library/train_util.py has them.

    `sshs_model_hash`: sha256 of all bytes after the header. `sshs_legacy_hash`: the first 8 hex digits of the
    sha256 of 64 KiB at offset 1 MiB, in a file whose header has the `ss_*` metadata alone.
    """
    head, order = header_bytes(layout(tensors), {k: v for k, v in metadata.items() if k.startswith("ss_")})
    whole, window = hashlib.sha256(), hashlib.sha256()
    begin, end = 1 << 20, (1 << 20) + (1 << 16)
    at = 0
    for block in _blocks(head, tensors, order):
        window.update(block[max(begin - at, 0):max(end - at, 0)])
        if at >= len(head):
            whole.update(block)
        at += len(block)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8],
            "modelspec.hash_sha256": "0x" + whole.hexdigest()}


def _blocks(head: bytes, tensors: Mapping[str, Tensor], order: list[str]) -> Iterator[bytes]:
    yield head
    for name in order:
        yield tensor_bytes(tensors[name])


def parsed(key: str, where: Path) -> tuple[str, str]:
    """A flat key as (layer path, part of it)."""
    name, _, suffix = key.partition(".")
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    if prefix is None:
        raise UserError(f"key {key!r} is not of kohya's format, as others here are", where=where)
    flat = name.removeprefix(prefix)
    foreign = next((what for beginning, what in FOREIGN.items() if suffix.startswith(beginning)), None)
    if foreign:
        raise UserError(f"key {key!r} is {foreign}, which is not supported yet", where=where)
    if suffix not in PARTS:
        raise UserError(f"key {key!r} ends in no part of an adapter", where=where)
    if "unet" in PREFIXES[prefix] and flat.startswith(original.BEGINNINGS):
        if flat in original.flat_paths():
            return f"unet.{original.flat_paths()[flat]}", PARTS[suffix]
        raise UserError(f"key {key!r} names no layer of a UNet in its authors' names", where=where)
    if "unet" in PREFIXES[prefix] and (path := mmdit_layers.original(flat)):
        return f"transformer.{path}", PARTS[suffix]
    for component in PREFIXES[prefix]:
        try:
            return f"{component}.{names.unflatten(component, flat)}", PARTS[suffix]
        except UserError:
            continue
    raise UserError(f"key {key!r} names no layer of a {' or '.join(PREFIXES[prefix])}", where=where)


def prefix_of(component: str, family: str, path: str) -> str:
    """What the flat name of a component's layer begins with; a text encoder's has a number where there is a second."""
    if component == LONE.get(family) and path != "text_projection":
        return "lora_te_"
    numbered = family in ("sdxl", "sdxl-refiner", "sd3")
    return {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_" if numbered else "lora_te_",
            "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}[component]
