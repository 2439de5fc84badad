"""One tensor in two layouts, and what the walks of all networks share.

Each network is walked once, layer by layer, from its configuration; the walk gives every tensor's name and shape in
diffusers' layout and in the original one. All else follows from that one table: translation in both directions, what is
missing, what has a wrong shape, what is surplus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from impasto.core.errors import UserError

Shape = tuple[int, ...]
Config = Mapping[str, Any]


class Entry(NamedTuple):
    """One of diffusers' tensors, and where the original layout has it.

    They differ in shape where LDM has a 1×1 convolution and diffusers a linear layer, and where the original holds
    several in one: `ldm_shape` is that of the whole, and `piece` (i, n) says that this is the i-th of n equal parts of
    its rows. `how`: "turned" for a transpose, "halves" where the first half of the rows is the second there, "identity"
    where the original has nothing, and diffusers a matrix that changes nothing.
    """

    name: str
    shape: Shape
    ldm: str
    ldm_shape: Shape
    piece: tuple[int, int] = (0, 1)
    how: str = ""


class Extra(NamedTuple):
    """A tensor that the original layout has and diffusers' has no place for, as nothing computes with it.

    It is written as the values of another one, `like` by its original name, or all as one number.
    """

    ldm: str
    shape: Shape
    like: str = ""
    value: float = 0.0


def layer_entries(name: str, ldm: str, shape: Shape, bias: bool = True, ldm_shape: Shape = ()) -> Iterator[Entry]:
    """The weight of a layer, and its bias."""
    yield Entry(f"{name}.weight", shape, f"{ldm}.weight", ldm_shape or shape)
    if bias:
        yield Entry(f"{name}.bias", shape[:1], f"{ldm}.bias", shape[:1])


def conv_entries(name: str, ldm: str, into: int, out: int, k: int = 3) -> Iterator[Entry]:
    """The weight of a convolution, and its bias."""
    return layer_entries(name, ldm, (out, into, k, k))


def shape_of(shapes: Mapping[str, Shape], name: str, dimensions: int) -> Shape:
    """The shape of a tensor that the configuration cannot be told without. `UserError` if it is not there."""
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions or 0 in shape:
        raise UserError(f"lacks the tensor {name}" if shape is None else
                        f"has a tensor {name} of shape {tuple(shape)}, where {dimensions} dimensions belong")
    return shape


def numbers(shapes: Mapping[str, Shape], pattern: str) -> set[int]:
    """The numbers that stand at the group of `pattern` in the names."""
    compiled = re.compile(pattern)
    return {int(match[1]) for name in shapes if (match := compiled.match(name))}


def refuse_unknown(config: Config, plain: Mapping[str, tuple[Any, ...]], noun: str) -> None:
    """Raise a `UserError` for a setting that changes a network's tensors in a way that is not known here."""
    for key, values in plain.items():
        if key in config and config[key] not in values:
            raise UserError(f"has a {noun} with {key} = {config[key]!r}, which is not supported")


def plain_spelling(name: str) -> str:
    """The name as it is."""
    return name


def no_extras(config: Config) -> Iterator[Extra]:
    """None: both layouts have the same tensors."""
    return iter(())
