"""Where a component's tensors are: in which file, under which keys, and how they lie there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from impasto.formats.tensor_files import TensorFile


class Place(NamedTuple):
    """Where a tensor is: the key of the file's tensor, the shape it has itself, and how it lies in there (`Entry`).

    An identity that the file does not hold has the key "".
    """

    key: str
    shape: tuple[int, ...]
    piece: tuple[int, int] = (0, 1)
    how: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is the file's tensor itself."""
        return self.piece == (0, 1) and not self.how

    def out_of(self, tensor: Tensor) -> Tensor:
        """The tensor itself, a view where one will do."""
        index, count = self.piece
        if count > 1:
            tensor = tensor.chunk(count)[index]
        return turned(tensor, self.how).reshape(self.shape)


def turned(tensor: Tensor, how: str) -> Tensor:
    """Between the two layouts, in either direction: see `Entry`."""
    if how == "halves":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.T if how == "turned" else tensor


@dataclass(frozen=True)
class Source:
    """Where a component's tensors are, by diffusers' names."""

    file: TensorFile
    places: dict[str, Place]

    def owners(self) -> dict[str, list[str]]:
        """The file's keys, and the names of the tensors in each, in the order in which they lie there."""
        found: dict[str, list[str]] = {}
        for name, place in self.places.items():
            if place.key:
                found.setdefault(place.key, []).append(name)
        return {key: sorted(names, key=lambda name: self.places[name].piece) for key, names in found.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The file's; of an identity, that of the component's first tensor."""
        key = self.places[name].key or next(place.key for place in self.places.values() if place.key)
        return self.file.dtype(key)

    def identity(self, name: str) -> Tensor:
        """A tensor that the file does not hold."""
        return torch.eye(self.places[name].shape[0], dtype=self.dtype(name))
