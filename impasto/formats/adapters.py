"""Weight adapters on disk: which format a file is in, loading it, saving one and reading it back.

A format is a `Codec`: one file and one line in `CODECS`. Codecs know the names of keys and nothing else; what
they share is here, the family that a file was made for and the order of a save, and beside: `parts` (named factors to
and from deltas), `adapter_bytes` (tensors to and from bytes), `meaning` (the check before every save).
"""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_write
from impasto.core.registry import Registry
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.formats import names, pictured
from impasto.formats.adapter_bytes import Taken, read_back, read_tensors, taken, upcast, write_tensors
from impasto.formats.detect import CONTEXT_WIDTHS, WIDER, family_told
from impasto.formats.header import Header, read_header
from impasto.formats.meaning import check_meaning
from impasto.formats.probe import is_pickle, is_picture

#: a new format is one file and one line; a file is given to the first that claims it
CODECS = Registry("adapter format", {
    "kohya": "impasto.formats.kohya:Kohya",
    "comfyui": "impasto.formats.comfyui:ComfyUI",
    "onetrainer": "impasto.formats.onetrainer:OneTrainer",
    "diffusers": "impasto.formats.peft:Diffusers",
    "peft": "impasto.formats.peft:PeftFolder",
    "webui-embedding": "impasto.formats.embeddings:WebuiEmbedding",
    "diffusers-embedding": "impasto.formats.embeddings:DiffusersEmbedding",
    "hypernetwork": "impasto.formats.hypernetwork:HypernetworkFile",
})

#: for each layer path its deltas
Layers = dict[str, tuple[Delta, ...]]

#: what may be asked for at a save
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: metadata that tells of one file's bytes or of what an `Adapter` holds itself; written anew at each save
COMPUTED = ("impasto.family", "impasto.base", "impasto.component", "sshs_model_hash", "sshs_legacy_hash",
            "modelspec.hash_sha256", "lora_adapter_metadata", "format")

#: part of an `Adapter` -> what it is called
PARTS = {"deltas": "changes of layers", "embeddings": "new tokens", "hooks": "a hypernetwork"}

#: the beginnings of keys that tell that a file is no weight adapter
OTHERS = {
    "model.diffusion_model.": "a checkpoint", "first_stage_model.": "a checkpoint or VAE",
    "cond_stage_model.": "a checkpoint", "conditioner.": "a checkpoint", "control_model.": "a ControlNet",
}


class Codec(abc.ABC):
    """One format. `claims` looks at names alone; `header` is None where `path` is a folder, a pickle or a picture."""

    name: ClassVar[str]
    #: which parts of an `Adapter` it has a place for: deltas, embeddings, hooks
    holds: ClassVar[frozenset[str]] = frozenset({"deltas"})

    @abc.abstractmethod
    def claims(self, path: Path, header: Header | None) -> bool:
        """Whether this format's own loader is the one to read `path`."""

    @abc.abstractmethod
    def load(self, path: Path, header: Header | None) -> Adapter:
        """Raises `UserError` for a key that the format does not know, naming it."""

    @abc.abstractmethod
    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        """Raises `UserError` for what the format cannot hold, before a byte is written."""

    @abc.abstractmethod
    def sizes(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> dict[Path, Taken]:
        """What `save` would write, by file; tensors may be without values (`planning.valueless`)."""


class FileCodec(Codec):
    """A format of one safetensors file."""

    @abc.abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path
               ) -> Layers:
        """Deltas by layer path, of a file's tensors (fp32)."""

    @abc.abstractmethod
    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A file's tensors, as they are to be stored, and its metadata."""

    def load(self, path: Path, header: Header | None) -> Adapter:
        assert header is not None
        return assemble(self.decode(read_tensors(path, header), header.metadata, path), header.metadata)

    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        tensors, metadata = self.encode(adapter, dtype, metadata, path)
        check_meaning(adapter.deltas, self.decode(upcast(tensors), metadata, path), dtype)
        with atomic_write(path) as file:
            write_tensors(file, tensors, metadata)
        read_back(path, tensors, metadata)

    def sizes(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> dict[Path, Taken]:
        return {path: taken(*self.encode(adapter, dtype, metadata, path))}


def load_adapter(path: Path | str, family: str | None = None) -> Adapter:
    """The adapter in a file or folder of any known format. Its factors are fp32, on the CPU.

    `family`: refuse an adapter that is known to be made for another one. Raises `UserError` in one line: not
    an adapter, truncated, a key that no format knows, a factor of a wrong shape, NaN.
    """
    path = Path(path)
    header = None if path.is_dir() or is_pickle(path) or is_picture(path) else read_header(path)
    codec = next((c for c in (CODECS.get(name)() for name in CODECS) if c.claims(path, header)), None)
    if codec is None:
        raise _unclaimed(path, header)
    adapter = codec.load(path, header)
    if family and adapter.family and adapter.family != family:
        raise UserError(f"is an adapter for {adapter.family}, and the base is {family}", where=path,
                        fix=f"choose a base of the {adapter.family} family, or another adapter")
    return adapter


def save_adapter(adapter: Adapter, path: Path | str, *, format: str = "kohya",
                 dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None) -> None:
    """Write `adapter` in `format`, whole or not at all, then read it back and compare.

    `metadata` goes on top of the adapter's own; all values are strings. Nothing is added that differs from
    one save to the next (a date is the caller's to give: `modelspec.date`): equal adapters give equal files.
    Raises `UserError` before anything is written if `format` or `dtype` cannot hold the adapter.
    """
    codec, adapter, told = _prepared(adapter, path := Path(path), format, dtype, metadata or {})
    codec.save(adapter, path, dtype, told)


def adapter_sizes(adapter: Adapter, path: Path | str, *, format: str = "kohya", dtype: torch.dtype = torch.float16,
                  metadata: Mapping[str, str] | None = None) -> dict[Path, Taken]:
    """What `save_adapter` would write, by file. Raises `UserError` as it does."""
    codec, adapter, told = _prepared(adapter, path := Path(path), format, dtype, metadata or {})
    return codec.sizes(adapter, path, dtype, told)


def _prepared(adapter: Adapter, path: Path, format: str, dtype: torch.dtype, metadata: Mapping[str, str]
              ) -> tuple[Codec, Adapter, dict[str, str]]:
    """The format's codec, the adapter under the paths that files spell, and what its file is to tell."""
    codec: Codec = CODECS.get(format)()
    if dtype not in DTYPES:
        raise UserError(f"adapters are not stored as {str(dtype).removeprefix('torch.')}", where=path,
                        fix="choose float16, bfloat16 or float32")
    if adapter.empty:
        raise UserError("the adapter changes nothing, there is nothing to save", where=path)
    for part, what in PARTS.items():
        if getattr(adapter, part) and part not in codec.holds:
            raise UserError(f"the adapter holds {what}, for which the format {format} has no place", where=path,
                            fix="save it as auto, which makes a file of each kind of thing")
    merged = {**adapter.metadata, **metadata}
    for key, value in merged.items():
        if not isinstance(value, str):
            raise UserError(f"metadata {key!r} is not a string", where=path)
    adapter = replace(adapter, deltas=canonical_layers(adapter, path))
    plain = {key: value for key, value in merged.items() if key not in COMPUTED}
    plain["impasto.base"] = json.dumps(adapter.base, sort_keys=True)
    if adapter.family:
        plain["impasto.family"] = adapter.family
    return codec, adapter, plain


def canonical_layers(adapter: Adapter, where: object) -> Layers:
    """The adapter's deltas under the paths that files spell (a text encoder's with `text_model.`)."""
    layers: Layers = {}
    for layer, terms in adapter.deltas.items():
        whole = ".".join(names.split(layer, where=where))
        if whole in layers:
            raise UserError(f"{whole} is there twice, with and without text_model.", where=where)
        layers[whole] = terms
    return layers


def assemble(layers: Layers, metadata: Mapping[str, str]) -> Adapter:
    """An `Adapter` out of a file's deltas and metadata."""
    try:
        base = json.loads(metadata.get("impasto.base", "{}"))
    except ValueError:
        base = {}
    if not (isinstance(base, dict) and all(isinstance(v, str) for v in base.values())):
        base = {}
    kept = {key: value for key, value in metadata.items() if key not in COMPUTED}
    widths = {layer: terms[0].shape[1] for layer, terms in layers.items() if len(terms[0].shape) > 1}
    return Adapter(deltas=dict(layers), metadata=kept, family=family_of(widths, metadata), base=base)


def family_of(widths: Mapping[str, int], metadata: Mapping[str, str]) -> str:
    """The family an adapter was made for, by its metadata, then by its layers' numbers of inputs; "" if nothing tells.
    """
    if told := family_told(metadata):
        return told
    for layer, inputs in widths.items():
        if layer.startswith("unet.") and layer.endswith(("attn2.to_k", "attn2.to_v")):
            return CONTEXT_WIDTHS.get(inputs, "")
        if layer.startswith("text_encoder_3."):
            return "sd3"
    own = [inputs for layer, inputs in widths.items() if layer.startswith("transformer.")]
    return "sd3" if own and WIDER not in own else ""


def _unclaimed(path: Path, header: Header | None) -> UserError:
    """The line for a file that no format knows."""
    if header is None and path.is_file() and is_picture(path):
        return pictured.refusal(path)
    if header is None and path.is_file():
        return UserError("is a pickle, and adapters of its kind are read from safetensors alone", where=path,
                         fix="save it as safetensors with the program that made it")
    if header is None:
        return UserError("is a folder without an adapter in it", where=path,
                         fix="a peft folder holds adapter_config.json and adapter_model.safetensors")
    if not header.tensors:
        return UserError("holds no tensors", where=path)
    for key in header.tensors:
        for beginning, what in OTHERS.items():
            if key.startswith(beginning):
                return UserError(f"is {what}, not a weight adapter (key {key!r})", where=path)
    return UserError(f"no adapter format knows the key {next(iter(header.tensors))!r}", where=path)
