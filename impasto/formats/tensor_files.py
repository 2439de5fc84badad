"""Tensors by name in one file or in several, whatever kind of file it is: what there is, and each one on demand."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from impasto.core.errors import UserError
from impasto.formats.header import read_header, torch_dtype
from impasto.formats.pickles import load_pickle, weights_in
from impasto.formats.probe import is_pickle, read_json


class TensorFile(abc.ABC):
    """Named tensors on the disk. `shapes` by name, in the order in which they are best read."""

    shapes: dict[str, tuple[int, ...]]
    #: texts that the file holds beside its tensors
    metadata: dict[str, str]

    @abc.abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Raises `UserError` for a type that torch does not have."""

    @abc.abstractmethod
    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, file by file: mapped from the file, one at a time."""

    @abc.abstractmethod
    def files(self, names: Iterable[str]) -> list[Path]:
        """The files that hold these tensors, sorted."""


class NoTensors(TensorFile):
    """No file at all: where configurations are all that is wanted."""

    def __init__(self) -> None:
        self.shapes, self.metadata = {}, {}

    def dtype(self, name: str) -> torch.dtype:
        raise KeyError(name)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def files(self, names: Iterable[str]) -> list[Path]:
        return []


class Safetensors(TensorFile):
    """One .safetensors file. Its header is checked before anything else (see `header.py`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        infos = sorted(header.tensors.items(), key=lambda item: item[1].offsets)
        self.shapes = {name: info.shape for name, info in infos}
        self.metadata = header.metadata
        self._dtypes = {name: info.dtype for name, info in infos}

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._dtypes[name], where=self.path)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                # other writers do not align their tensors, and not every kernel reads such a mapping
                yield name, tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    def files(self, names: Iterable[str]) -> list[Path]:
        return [self.path]


class Pickle(TensorFile):
    """One .ckpt, .pt or .bin file, by the rule of `pickles.py`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self.metadata = weights_in(load_pickle(path), path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._tensors[name]

    def files(self, names: Iterable[str]) -> list[Path]:
        return [self.path]


class Shards(TensorFile):
    """Several files, and the index (`*.index.json`) that says which one holds which tensor."""

    def __init__(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise UserError("is no index of shards", where=index, fix="download it again")
        for name in {*weight_map.values()}:
            if name != Path(name).name or "\\" in name or ":" in name:
                raise UserError(f"names a shard outside its folder, {name!r}", where=index)
        self._shards = {name: open_tensors(index.parent / name) for name in sorted({*weight_map.values()})}
        self._homes: dict[str, str] = {}
        for tensor, name in sorted(weight_map.items(), key=lambda item: item[1]):
            if tensor not in self._shards[name].shapes:
                raise UserError(f"lacks the tensor {tensor}, which its index puts there", where=index.parent / name,
                                fix="download it again")
            self._homes[tensor] = name
        self.shapes = {tensor: self._shards[name].shapes[tensor] for tensor, name in self._homes.items()}
        self.metadata = {}

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[self._homes[name]].dtype(name)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = list(names)
        for shard in self._shards:
            yield from self._shards[shard].read(name for name in wanted if self._homes[name] == shard)

    def files(self, names: Iterable[str]) -> list[Path]:
        homes = {self._homes[name] for name in names}
        return [file for shard in sorted(homes) for file in self._shards[shard].files(())]


def open_tensors(path: Path) -> TensorFile:
    """The tensors in a file, or in the shards that an index names. Raises `UserError`."""
    if path.name.endswith(".json"):
        return Shards(path)
    return Pickle(path) if is_pickle(path) else Safetensors(path)
