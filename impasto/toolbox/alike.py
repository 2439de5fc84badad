"""Whether two checkpoints can be told tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable

from impasto.core.errors import UserError
from impasto.deltas.fit import alike
from impasto.formats.checkpoint import Checkpoint


def shared(first: Checkpoint, others: Iterable[Checkpoint], verb: str, *, wider: bool = False) -> list[str]:
    """Components that all have, in the first one's order.

    Raises `UserError` if two are of different families, have nothing in common, or a tensor of different shapes or of
    whole numbers; `verb` says what was to be done with them. `wider`: the first one's UNet may take more channels
    (inpainting).
    """
    others = list(others)
    for other in others:
        if other.family != first.family:
            raise UserError(f"is {_family(other)}, and {first.path.name} is {_family(first)}", where=other.path,
                            fix=f"{verb} checkpoints of one family")
    found = [name for name in first.components if all(name in other.components for other in others)]
    if not found:
        raise UserError(f"shares no part with {first.path.name}", where=others[0].path,
                        fix=f"{verb} checkpoints that have one in common")
    for other in others:
        for component in found:
            _check(first, other, component, verb, wider)
    return found


def _family(checkpoint: Checkpoint) -> str:
    return f"of the family {checkpoint.family}" if checkpoint.family else "a VAE alone"


def _check(first: Checkpoint, other: Checkpoint, component: str, verb: str, wider: bool) -> None:
    mine, theirs = first.names(component), other.names(component)
    for name, (shape, dtype) in mine.items():
        path = f"{component}.{name}"
        if name not in theirs:
            raise _other_kind(f"its {path} is missing", first, other, shape, verb)
        if not (dtype.is_floating_point and theirs[name][1].is_floating_point):
            raise UserError(f"its {path} is no floating-point tensor in one of the two", where=other.path,
                            fix=f"{verb} checkpoints in floating point")
        own = theirs[name][0]
        if not alike(own, shape) and not (wider and name == "conv_in.weight" and _narrower(own, shape)):
            raise _other_kind(f"its {path} is {own}", first, other, shape, verb)


def _other_kind(what: str, first: Checkpoint, other: Checkpoint, shape: tuple[int, ...], verb: str) -> UserError:
    return UserError(f"{what}, and in {first.path.name} it is {shape}", where=other.path,
                     fix=f"{verb} checkpoints of one kind: an inpainting one, say, with another inpainting one")


def _narrower(narrow: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a convolution takes less than another, and is else the same."""
    return narrow[0] == shape[0] and narrow[1] < shape[1] and narrow[2:] == shape[2:]
