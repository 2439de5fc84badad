"""Textual inversion embeddings: A1111's file, diffusers' file, and those that lie in a LoRA's file.

- A1111 and ComfyUI, safetensors: `emb_params` (n, d), or `clip_l` and `clip_g` where there are two text encoders; the
  file's name is the token. Old ones are pickles: `string_to_param` with one entry; or pictures, see `pictured`.
- diffusers: one key, which is the token, (d) or (n, d); its loader calls the second vector `token_1`, and so on.
- bundled in a LoRA's file: `bundle_emb.NAME.string_to_param.*`, or `bundle_emb.NAME.clip_l` and `.clip_g`, as
  extensions-builtin/Lora/networks.py of github.com/AUTOMATIC1111/stable-diffusion-webui and comfy/sd1_clip.py of
  github.com/Comfy-Org/ComfyUI read them. A name ends at its first dot.

Shapes: n vectors, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_write
from impasto.deltas.adapter import Adapter
from impasto.formats.adapter_bytes import Taken, read_back, read_tensors, stored, taken, write_tensors
from impasto.formats.adapters import Codec, assemble
from impasto.formats.detect import CONTEXT_WIDTHS, detect, detect_names
from impasto.formats.header import Header
from impasto.formats.pickles import ParameterDict, load_pickle, weights_in
from impasto.formats.pictured import embedding_in
from impasto.formats.probe import is_picture

#: a file's name of a text encoder -> the component; the first is everybody's, `emb_params` is it alone
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
COMPONENTS = {component: name for name, component in ENCODERS.items()}
ALONE = "emb_params"

#: what keys of bundled embeddings begin with, and how those for one text encoder end
BUNDLE, ENTRY = "bundle_emb.", "string_to_param.*"

#: metadata that tells the token, which otherwise is the file's name
TOKEN = "impasto.token"

#: family -> the beginning of `modelspec.architecture`
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}

#: one token's vectors (n, d) by component
Vectors = dict[str, Tensor]


class _EmbeddingFile(Codec):
    """One file of one token."""

    holds = frozenset({"embeddings"})
    #: what `detect` calls its layout
    layout = ""

    def claims(self, path: Path, header: Header | None) -> bool:
        if header is not None:
            found = detect_names({name: info.shape for name, info in header.tensors.items()}, header.metadata)
        elif path.is_file():
            found = detect(path)
        else:
            return False
        return found.kind == "embedding" and found.layout == self.layout

    def contents(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]
                 ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The file's tensors and metadata."""
        if len(adapter.embeddings) > 1:
            raise UserError(f"a {self.name} file holds one token, not {len(adapter.embeddings)}", where=path,
                            fix="save them one by one, or as kohya")
        ((token, vectors),) = adapter.embeddings.items()
        tensors = self.encode(token, {encoder: _checked(f"{token}: {encoder}", values, dtype, path)
                                      for encoder, values in vectors.items()}, path)
        about = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": path.stem}
        if adapter.family in ARCHITECTURES:
            about["modelspec.architecture"] = f"{ARCHITECTURES[adapter.family]}/textual-inversion"
        return tensors, {**about, **metadata, TOKEN: token}

    def sizes(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> dict[Path, Taken]:
        return {path: taken(*self.contents(adapter, path, dtype, metadata))}

    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        tensors, metadata = self.contents(adapter, path, dtype, metadata)
        with atomic_write(path) as file:
            write_tensors(file, tensors, metadata)
        read_back(path, tensors, metadata)

    def encode(self, token: str, vectors: Vectors, where: Path) -> dict[str, Tensor]:
        """A file's tensors. Raises `UserError` for text encoders that the format cannot tell apart."""
        raise NotImplementedError


class WebuiEmbedding(_EmbeddingFile):
    """A1111's and ComfyUI's file: safetensors; or a pickle or a picture, which are read only."""

    name = "webui-embedding"

    def load(self, path: Path, header: Header | None) -> Adapter:
        if header is None and is_picture(path):
            token, values = embedding_in(path)
            return _made(path, {"text_encoder": values}, {TOKEN: token})
        if header is None:
            return _made(path, {"text_encoder": _old_entry(path)}, {})
        tensors = read_tensors(path, header)
        if unknown := tensors.keys() - {*ENCODERS, ALONE}:
            raise UserError(f"key {min(unknown)!r} is of no text encoder", where=path)
        if ALONE in tensors and len(tensors) > 1:
            raise UserError(f"holds {ALONE} beside others of its kind", where=path)
        return _made(path, {ENCODERS.get(name, "text_encoder"): values for name, values in tensors.items()},
                     header.metadata)

    def encode(self, token: str, vectors: Vectors, where: Path) -> dict[str, Tensor]:
        if vectors.keys() == {"text_encoder"}:
            return {ALONE: vectors["text_encoder"]}
        return {_name(component, where): values for component, values in vectors.items()}


class DiffusersEmbedding(_EmbeddingFile):
    """diffusers' file: the token is the key."""

    name = "diffusers-embedding"
    layout = "diffusers"

    def load(self, path: Path, header: Header | None) -> Adapter:
        tensors, metadata = (read_tensors(path, header), header.metadata) if header is not None else \
            (weights_in(load_pickle(path), path)[0], {})
        ((token, values),) = tensors.items()
        return _made(path, {"text_encoder": values}, {**metadata, TOKEN: token})

    def encode(self, token: str, vectors: Vectors, where: Path) -> dict[str, Tensor]:
        if vectors.keys() != {"text_encoder"}:
            raise UserError(f"{token} has vectors for {', '.join(vectors)}, and diffusers' file holds those of one "
                            "text encoder", where=where, fix="save it as webui-embedding")
        return {token: vectors["text_encoder"]}


# --- in a LoRA's file ------------------------------------------------------------------------------------


def bundled(embeddings: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype, where: Path) -> dict[str, Tensor]:
    """A LoRA file's tensors for new tokens. Raises `UserError` for a token with a dot in its name."""
    tensors: dict[str, Tensor] = {}
    for token, vectors in embeddings.items():
        if "." in token:
            raise UserError("a file of several tokens cannot hold one with a dot in its name", where=token,
                            fix="save it by itself, as webui-embedding")
        alone = vectors.keys() == {"text_encoder"}
        for component, values in vectors.items():
            name = ENTRY if alone else _name(component, where)
            tensors[f"{BUNDLE}{token}.{name}"] = _checked(f"{token}: {component}", values, dtype, where)
    return tensors


def unbundled(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Vectors]:
    """The tokens among a LoRA file's tensors. Raises `UserError` for a key that none of its readers knows."""
    found: dict[str, Vectors] = {}
    for key, values in tensors.items():
        if key.startswith(BUNDLE):
            token, _, name = key.removeprefix(BUNDLE).partition(".")
            component = ENCODERS.get(name, "text_encoder")
            known = name in ENCODERS or name == ALONE or name.startswith(ENTRY.partition(".")[0] + ".")
            if not token or not known or component in found.get(token, {}):
                raise UserError(f"key {key!r} is not of a bundled embedding's kind", where=where)
            found.setdefault(token, {})[component] = _shaped(values, key, where)
    return found


def family_by_width(embeddings: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The family that vectors are made for; "" where their width does not tell."""
    for vectors in embeddings.values():
        if "text_encoder_3" in vectors:
            return "sd3"
        if "text_encoder_2" in vectors:
            return "sdxl"
        for values in vectors.values():
            return CONTEXT_WIDTHS.get(values.shape[1], "")
    return ""


# --- shared ----------------------------------------------------------------------------------------------


def _made(path: Path, vectors: Vectors, metadata: Mapping[str, str]) -> Adapter:
    shaped = {component: _shaped(values, component, path) for component, values in vectors.items()}
    adapter = assemble({}, {key: value for key, value in metadata.items() if key != TOKEN})
    adapter.embeddings = {metadata.get(TOKEN) or path.stem: shaped}
    adapter.family = adapter.family or family_by_width(adapter.embeddings)
    return adapter


def _shaped(values: Tensor, what: str, where: Path) -> Tensor:
    """Vectors (n, d), fp32."""
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2 or not values.numel() or not values.is_floating_point():
        raise UserError(f"{what} is of shape {tuple(values.shape)}, which are no vectors", where=where)
    values = values.detach().float().clone()
    if not torch.isfinite(values).all():
        raise UserError(f"{what} holds NaN or infinity", where=where, fix="the training that made it has diverged")
    return values


def _checked(what: str, values: Tensor, dtype: torch.dtype, where: Path) -> Tensor:
    values = values.detach().float().cpu()
    if not torch.isfinite(values).all():
        raise UserError(f"{what} holds NaN or infinity", where=where, fix="the training has diverged")
    return stored(what, values, dtype, where)


def _name(component: str, where: Path) -> str:
    """A file's name of a text encoder."""
    if component not in COMPONENTS:
        raise UserError(f"embeddings of {component} have no place in a file", where=where)
    return COMPONENTS[component]


def _old_entry(path: Path) -> Tensor:
    """The vectors in A1111's pickle."""
    loaded = load_pickle(path)
    table = loaded.get("string_to_param") if isinstance(loaded, dict) else None
    if table is None:
        tensors, _ = weights_in(loaded, path)
        found = [values for name, values in tensors.items() if name == ALONE]
    else:
        entries = table.parameters if isinstance(table, ParameterDict) else table
        found = [values for values in entries.values() if isinstance(values, Tensor)]
    if len(found) != 1:
        fix = "save each by itself" if found else "take another one, or save it anew"
        raise UserError(f"holds {len(found)} embeddings where A1111's file has one", where=path,
                        fix=f"{fix}, as safetensors, with the program that made it")
    return found[0]
