"""kohya's LoRA file, which every program reads: `lora_unet_…` keys, alpha beside them, `ss_*` metadata.

After a layer's name: `.lora_up.weight` (out, r[, 1, 1]), `.lora_down.weight` (r, in[, k, k]), `.alpha`. The
names of the layers are diffusers', flat. As networks/lora.py of github.com/kohya-ss/sd-scripts has it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.formats import names
from impasto.formats.adapters import (
    Factors,
    FileCodec,
    factors_of,
    layout,
    pair,
    read_tensors,
    stored,
    tensor_bytes,
)
from impasto.formats.embeddings import BUNDLE, bundled, family_by_width, unbundled
from impasto.formats.header import Header, header_bytes

#: what a layer's name begins with -> the component it is in
PREFIXES = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}

#: what follows a layer's name -> the factor it is
PARTS = {"lora_up.weight": "up", "lora_down.weight": "down", "alpha": "alpha"}

#: how the parts begin in relatives of this format that are not LoRA of two factors
FOREIGN = {
    "lora_mid": "a Tucker core", "dora_scale": "a DoRA magnitude", "hada_": "a LoHa factor",
    "lokr_": "a LoKr factor", "oft_": "an OFT block", "diff": "a full difference", "w_norm": "of a norm",
    "b_norm": "of a norm",
}

#: family -> `ss_base_model_version`, `modelspec.architecture` without "/lora", `modelspec.resolution`
FAMILIES = {
    "sd1": ("sd_v1", "stable-diffusion-v1", "512x512"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512", "512x512"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024"),
}


class Kohya(FileCodec):
    """One safetensors file of `lora_unet_…` and `lora_te…` keys, and new tokens' `bundle_emb.…` beside them."""

    name = "kohya"
    holds = frozenset({"deltas", "embeddings"})

    def claims(self, path: Path, header: Header | None) -> bool:
        return header is not None and any(key.startswith((*PREFIXES, BUNDLE)) for key in header.tensors)

    def load(self, path: Path, header: Header | None) -> Adapter:
        adapter = super().load(path, header)
        assert header is not None
        tokens = {name: info for name, info in header.tensors.items() if name.startswith(BUNDLE)}
        if tokens:
            adapter.embeddings = unbundled(read_tensors(path, dataclasses.replace(header, tensors=tokens)), path)
            adapter.family = adapter.family or family_by_width(adapter.embeddings)
        return adapter

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path
               ) -> dict[str, Factors]:
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(BUNDLE):  # no layer's: see `load`
                continue
            layer, part = _parse(key, where)
            if part in found.setdefault(layer, {}):
                raise UserError(f"{layer} has two tensors for its {part}", where=where)
            found[layer][part] = tensor
        return {layer: pair(layer, parts.get("up"), parts.get("down"), parts.get("alpha"), where)
                for layer, parts in found.items()}

    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        layers = {layer: factors_of(layer, terms, "kohya", where) for layer, terms in adapter.deltas.items()}
        tensors = bundled(adapter.embeddings, dtype, where)
        for layer, factors in layers.items():
            name = _flat_name(layer, adapter.family)
            tensors[f"{name}.lora_up.weight"] = stored(layer, factors.up, dtype, where)
            tensors[f"{name}.lora_down.weight"] = stored(layer, factors.down, dtype, where)
            # kohya rounds alpha to the file's type; 3.3 in fp16 would change the layer's strength
            tensors[f"{name}.alpha"] = torch.tensor(factors.alpha, dtype=torch.float32)
        told = _dimensions(layers) if layers else {}
        metadata = {**describe(layers, adapter.family, where.stem), **metadata, **told}
        return tensors, {**metadata, **hashes(tensors, metadata)}


def describe(layers: Mapping[str, Factors], family: str, title: str) -> dict[str, str]:
    """The metadata that other programs show or ask for, where the caller says nothing else."""
    kind = {"ss_network_module": "networks.lora", "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": title, "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "epsilon"}
    if family in FAMILIES:
        version, architecture, resolution = FAMILIES[family]
        kind |= {"ss_base_model_version": version, "ss_v2": str(family == "sd2"),
                 "modelspec.architecture": f"{architecture}/lora", "modelspec.resolution": resolution}
    return kind


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


def _parse(key: str, where: Path) -> tuple[str, str]:
    """A file's key as (layer path, part of it)."""
    name, _, suffix = key.partition(".")
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    if prefix is None:
        raise UserError(f"key {key!r} is not of kohya's format, as others here are", where=where)
    flat, component = name.removeprefix(prefix), PREFIXES[prefix]
    if flat.startswith(("input_blocks_", "middle_block_", "output_blocks_", "label_emb_", "time_embed_")):
        raise UserError(f"key {key!r} is in the original (sgm) names, which SDXL files use; "
                        "they are not supported yet", where=where)
    foreign = next((what for beginning, what in FOREIGN.items() if suffix.startswith(beginning)), None)
    if foreign:
        raise UserError(f"key {key!r} is {foreign}, which is not supported yet", where=where)
    if suffix not in PARTS:
        raise UserError(f"key {key!r} ends in no part of a LoRA", where=where)
    try:
        return f"{component}.{names.unflatten(component, flat)}", PARTS[suffix]
    except UserError as error:
        raise UserError(f"key {key!r} names no layer of a {component}", where=where) from error


def _flat_name(layer: str, family: str) -> str:
    """`unet.conv_in` -> `lora_unet_conv_in`; a text encoder's prefix depends on whether there is a second."""
    component, _, path = layer.partition(".")
    numbered = family.startswith("sdxl")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if numbered else "lora_te_",
              "text_encoder_2": "lora_te2_"}[component]
    return prefix + names.flatten(path)


def _dimensions(layers: Mapping[str, Factors]) -> dict[str, str]:
    """`ss_network_dim`, `_alpha`, and `_args` for the convolutions of more than 1×1 (kohya's `conv_dim`)."""

    def common(values: Iterable[float]) -> str:
        different = set(values)
        return f"{different.pop():g}" if len(different) == 1 else "Dynamic"

    wide = [f for f in layers.values() if f.down[0, 0].numel() > 1]
    main = [f for f in layers.values() if f.down[0, 0].numel() == 1] or wide
    conv = {"conv_dim": common(f.rank for f in wide), "conv_alpha": common(f.alpha for f in wide)}
    return {"ss_network_dim": common(f.rank for f in main), "ss_network_alpha": common(f.alpha for f in main),
            "ss_network_args": json.dumps(conv if wide else {})}
