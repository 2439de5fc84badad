"""The header of a safetensors file: what is in it, read and checked before any tensor is.

The format (github.com/huggingface/safetensors): 8 bytes, the length of the header, little-endian; the
header, a JSON object of `name: {"dtype", "shape", "data_offsets"}` and `"__metadata__": {str: str}`; the
tensors' bytes, back to back. A file comes from anywhere, so each rule of the format is checked here, in
Python's unbounded integers and before anything is allocated by what the file claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from impasto.core.errors import UserError
from impasto.core.files import no_such_file

if TYPE_CHECKING:
    import torch

#: as the format's own library has it: a longer header is refused unread
MAX_HEADER = 100_000_000

#: bits of an element, by the format's name of its type
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}

#: torch's names for those types that adapters and checkpoints hold
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}


class TensorInfo(NamedTuple):
    """One tensor of the file: `dtype` in the format's name, `offsets` in bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """All that a safetensors file says about itself. `start`: where the tensors' bytes begin in the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    start: int


def read_header(path: Path | str) -> Header:
    """The checked header of the safetensors file at `path`; no tensor is read.

    Raises `UserError` in one line for whatever is not a whole, well-formed safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > MAX_HEADER or not 2 <= length <= size - 8:
                raise _not_safetensors(path, head + file.read(64), length, size)
            raw = file.read(length)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=path) from error
    entries = _parse(raw, path)
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _malformed("its metadata is not a table of strings", path)
    tensors = {name: _tensor_info(name, entry, path) for name, entry in entries.items()}
    _check_layout(tensors, size - 8 - length, path)
    return Header(tensors, metadata, 8 + length)


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]],
                 metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header of a file of `tensors` (name -> (dtype, shape)), and the order in which their bytes follow.

    Widest type first, then by name, padded to 8 bytes: every tensor is aligned, as the format's own writer
    does. The library writes the metadata in a random order; here it is sorted, so equal content gives equal
    bytes.
    """
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, order


def torch_dtype(name: str, where: object = "") -> torch.dtype:
    """torch's type for the format's name of one. `UserError` for types that torch cannot hold."""
    import torch

    if name not in TORCH_NAMES:
        raise UserError(f"holds tensors of type {name}, which is not supported", where=where)
    return getattr(torch, TORCH_NAMES[name])


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name for one of torch's types; KeyError for a type that files of ours never hold."""
    short = str(dtype).removeprefix("torch.")
    return {theirs: ours for ours, theirs in TORCH_NAMES.items()}[short]


def _malformed(what: str, path: Path) -> UserError:
    return UserError(f"is not a valid safetensors file: {what}", where=path, fix="download or save it again")


def _not_safetensors(path: Path, start: bytes, length: int, size: int) -> UserError:
    """The line for a file whose first 8 bytes are no length of a header that it could hold."""
    if start.startswith(b"version https://git-lfs"):
        return UserError("is a Git LFS pointer, not the file itself", where=path, fix="run `git lfs pull`")
    if start.startswith(b"GGUF"):
        return UserError("is a GGUF file: its weights are packed in a few bits for running alone", where=path,
                         fix="take the .safetensors file that it was made of")
    if start.lstrip()[:1] == b"<":
        return UserError("is a web page, not a safetensors file", where=path,
                         fix="the download failed, or wanted a login; download it again")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return UserError("is a pickle file (.ckpt, .pt or .bin) under the name of a safetensors file",
                         where=path, fix="rename it")
    if 2 <= length <= MAX_HEADER and start[8:9] in (b"{", b""):
        return UserError(f"is truncated: its header takes {length} bytes, the whole file has {size}",
                         where=path, fix="download it again")
    return UserError("is not a safetensors file", where=path,
                     fix="check that it is the file you meant, or download it again")


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    """The header's JSON object, refusing names that occur twice (a reader could take either)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise _malformed(f"the name {_short(name)} occurs twice", path)
            table[name] = value
        return table

    if raw[:1] != b"{":
        raise _malformed("its header is not a JSON object", path)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise _malformed("its header is not JSON", path) from None
    return entries


def _tensor_info(name: str, entry: Any, path: Path) -> TensorInfo:
    """One entry, checked by itself: types, and that the bytes are as many as the shape takes."""

    def fail(what: str) -> UserError:
        return _malformed(f"tensor {_short(name)} {what}", path)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("lacks a dtype, shape or data_offsets, or has something else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise fail(f"has the unknown type {_short(dtype)}")
    if not _naturals(shape):
        raise fail("has a shape that is not a list of whole numbers from 0 up")
    if not _naturals(offsets) or len(offsets) != 2:
        raise fail("has data_offsets that are not two whole numbers")
    if math.prod(shape) * BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise fail("has another number of bytes than its shape and type take")
    return TensorInfo(dtype, tuple(shape), (offsets[0], offsets[1]))


def _naturals(value: Any) -> bool:
    return (isinstance(value, list) and len(value) <= 64
            and all(type(n) is int and 0 <= n < 2**63 for n in value))


def _check_layout(tensors: Mapping[str, TensorInfo], available: int, path: Path) -> None:
    """The tensors' bytes must follow one another, without gap or overlap, to the end of the file."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        if info.offsets[0] != end:
            kind = "overlaps another" if info.offsets[0] < end else "leaves a gap before it"
            raise _malformed(f"tensor {_short(name)} {kind}", path)
        end = info.offsets[1]
    if end > available:
        raise UserError(f"is truncated: {end - available} bytes are missing at its end", where=path,
                        fix="download it again")
    if end < available:
        raise _malformed(f"{available - end} bytes at its end belong to no tensor", path)


def _short(value: Any) -> str:
    """A value from the file, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
