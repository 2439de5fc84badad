"""An adapter's tensors as bytes: in the type that a file holds, whole, and the same bytes for the same content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.formats.header import Header, dtype_name, header_bytes, read_header, torch_dtype


class Taken(NamedTuple):
    """What a file takes, in bytes: its tensors, and all else, which is a header or a config."""

    tensors: int
    rest: int


def stored(layer: str, tensor: Tensor, dtype: torch.dtype, where: object) -> Tensor:
    """`tensor` in the file's type. `UserError` where a value is too large for it."""
    cast = tensor.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        short = dtype_name(dtype)
        raise UserError(f"{layer} holds values up to {tensor.abs().max():.3g}, too large for {short}",
                        where=where, fix="save as bfloat16 or float32")
    return cast


def read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """All tensors of a file as fp32. `UserError` where one holds NaN or infinity, or is of whole numbers.

    Some files have an alpha that is a whole number.
    """
    tensors = {}
    with open(path, "rb") as file:
        for name, info in header.tensors.items():
            dtype = torch_dtype(info.dtype, where=path)
            if not dtype.is_floating_point and not name.endswith("alpha"):
                raise UserError(f"tensor {name!r} is of {info.dtype}, and an adapter's numbers are floating-point ones",
                                where=path, fix="save it as F16 or F32 with the program that made it")
            file.seek(header.start + info.offsets[0])
            raw = bytearray(file.read(info.offsets[1] - info.offsets[0]))
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(info.shape).float()
            if not torch.isfinite(tensors[name]).all():
                raise UserError(f"tensor {name!r} holds NaN or infinity", where=path,
                                fix="the training that made it has diverged; there is nothing to mend in it")
    return tensors


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A whole safetensors file. Equal content gives equal bytes."""
    head, order = header_bytes(layout(tensors), metadata)
    file.write(head)
    for name in order:
        file.write(tensor_bytes(tensors[name]))


def taken(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Taken:
    """What `write_tensors` will write."""
    head, _ = header_bytes(layout(tensors), metadata)
    return Taken(sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values()), len(head))


def layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `header_bytes` wants to know of tensors."""
    return {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def upcast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def read_back(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Compare what is on the disk with what was meant to be there, byte for byte."""
    header = read_header(path)
    with open(path, "rb") as file:
        same = header.metadata == metadata and set(header.tensors) == set(tensors)
        for name, tensor in tensors.items() if same else ():
            info = header.tensors[name]
            file.seek(header.start + info.offsets[0])
            same = same and file.read(info.offsets[1] - info.offsets[0]) == tensor_bytes(tensor)
    if not same:
        raise UserError("reads back otherwise than it was written", where=path,
                        fix="the disk or its cache is failing; save to another one")
