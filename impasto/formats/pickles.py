"""Old files (.ckpt, .pt, .bin) are pickles, that is, programs: read without ever running what they bring.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses all else. Files of the field
name a few things more, beside the weights (the first Stable Diffusion files: a Lightning callback, numpy
scalars). For those names, and no others, stand-ins of ours are put in, which take anything and do nothing.
There is no second way in: what this refuses stays unread.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import no_such_file

#: what torch raises for a pickle that is broken, by accident or by intent
_BROKEN = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError,
           MemoryError, struct.error)


class Inert:
    """Stands in for a class or a function that a file names: takes any arguments and any state, keeps nothing."""

    def __new__(cls, *arguments: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class ModelCheckpoint(Inert):
    """For Lightning's callback, a key beside the weights in Stable Diffusion 1.4's own file."""


class NumpyScalar(Inert):
    """For `numpy.core.multiarray.scalar`: the callback's best score."""


class NumpyDtype(Inert):
    """For `numpy.dtype`, an argument of the above."""


class ParameterDict(Inert):
    """For torch's module of that name, around the vectors of old embeddings: keeps the tensors by name."""

    parameters: Mapping[str, Tensor] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        found = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(found, dict):
            self.parameters = {name: value.detach() for name, value in found.items()
                               if isinstance(name, str) and isinstance(value, Tensor)}


#: name in a pickle -> what is built in its place
STAND_INS: dict[str, type[Inert]] = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": ModelCheckpoint,
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint": ModelCheckpoint,
    "torch.nn.modules.container.ParameterDict": ParameterDict,
    "numpy.core.multiarray.scalar": NumpyScalar,
    "numpy._core.multiarray.scalar": NumpyScalar,
    "numpy.dtype": NumpyDtype,
}


def load_pickle(path: Path | str) -> Any:
    """What a pickle that torch wrote holds; nothing in it is executed. Tensors are mapped, not read, where they can be.

    Raises `UserError` in one line: names something outside the allow-list, is damaged, is no such file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=path) from error
    archive = start == b"PK\x03\x04"
    if archive:
        _check_archive(path)
    elif start[:1] != b"\x80":
        raise UserError("is empty" if not start else "is not a file that torch wrote", where=path,
                        fix="download it again")
    allowed: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            # both are about files that other programs wrote, and the reader can do nothing about them
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except _BROKEN as error:
        raise UserError(f"is a damaged pickle file ({_first_line(error)})", where=path,
                        fix="download it again") from None


#: names of the table that holds the weights: Lightning's, and those of the programs that train upscalers
TABLES = ("state_dict", "params_ema", "params")


def weights_in(loaded: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name in what a checkpoint's pickle holds, and the texts beside them.

    They are in the object itself, in a table of one of the names in `TABLES`, or in several tables, whose names
    then begin theirs.
    """
    texts: dict[str, str] = {}
    if isinstance(loaded, dict):
        texts = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, str)}
        inner = next((loaded[name] for name in TABLES if name in loaded), loaded)
        tensors = _tensors(inner)
        for table, content in () if tensors or inner is not loaded else loaded.items():
            tensors |= {f"{table}.{name}": tensor for name, tensor in _tensors(content).items()}
        if tensors:
            return tensors, texts
    raise UserError("holds no tensors by name", where=path)


def _tensors(table: Any) -> dict[str, Tensor]:
    """The tensors by name in one table; none where there is no table."""
    return {name: value.detach() for name, value in table.items() if isinstance(name, str)
            and isinstance(value, Tensor) and _plain(value)} if isinstance(table, dict) else {}


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor has elements that can be read as they are."""
    return tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"


def _check_archive(path: Path) -> None:
    """torch stores a zip file's entries as they are; a compressed one could grow to any size when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeError) as error:
        raise UserError("is truncated or damaged: its table of contents is not there", where=path,
                        fix="download it again") from error
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise UserError("is a compressed zip file, not one that torch wrote", where=path)
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError("is damaged: its entries overlap", where=path, fix="download it again")


def _refused(path: Path, message: str) -> UserError:
    """The line for a pickle that wants more than the allow-list has."""
    if found := re.search(r"GLOBAL (\S+)", message):
        return UserError(f"wants to run code ({found[1][:100]}) and was refused; nothing of it was run", where=path,
                         fix="use a .safetensors version of it")
    return UserError("is a pickle file of a kind that is not read", where=path,
                     fix="use a .safetensors version of it")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
