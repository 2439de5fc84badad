"""Putting an adapter on a base, after a look at whether it was made for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach, find_layer
from impasto.deltas.delta import Delta
from impasto.families.base import Base


def apply(base: Base, adapter: Adapter, strength: float = 1.0, *, report: Reporter = SILENT) -> Applied:
    """Let the base compute with `adapter` from now on, until what is returned is detached.

    Its factors are copied to the device of the layers they belong to, where that is another one. `report` gets
    the `notices`. Raises `UserError`, before anything is changed, for an adapter of another family, a layer that
    the base does not have, or one of another shape (both shapes are told).
    """
    for line in notices(base, adapter):
        report.note(line)
    return Applied([attach(base.components, {path: tuple(_placed(base, path, term) for term in terms)
                                             for path, terms in adapter.deltas.items()}, strength)])


class Part(Protocol):
    """One kind of what an adapter puts on a base."""

    @property
    def enabled(self) -> bool:
        """Whether it has effect."""
        ...

    @enabled.setter
    def enabled(self, value: bool) -> None: ...

    def detach(self) -> None:
        """Take it off again. Doing it twice does no harm."""
        ...


class Applied:
    """An adapter on its base, until `detach`. As a context manager it detaches at the end."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    @property
    def enabled(self) -> bool:
        """Whether it has effect; set it to False to have the base alone."""
        return all(part.enabled for part in self._parts)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for part in self._parts:
            part.enabled = value

    def detach(self) -> None:
        """Take all of it off. Doing it twice does no harm."""
        for part in reversed(self._parts):
            part.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.detach()


def notices(base: Base, adapter: Adapter) -> list[str]:
    """What the user may want to know: one line if the adapter was made on another checkpoint of the family.

    Raises `UserError` for an adapter of another family.
    """
    if adapter.family and adapter.family != base.family:
        raise UserError(f"the adapter is for {adapter.family}, the base is {base.family}", where=base.source or "",
                        fix="take a base of the adapter's family")
    touched = {path.partition(".")[0] for path in adapter.deltas} & adapter.base.keys() & base.components.keys()
    own = base.origin(touched)
    other = sorted(name for name in touched if own[name] != adapter.base[name])
    return [f"the adapter was made on another checkpoint of {base.family} ({', '.join(other)})"] if other else []


def _placed(base: Base, path: str, term: Delta) -> Delta:
    """The term on its layer's device."""
    wanted = next(find_layer(base.components, path).parameters()).device
    first = next(term.parameters(), None)
    return term if first is None or first.device == wanted else copy.deepcopy(term).to(wanted)
