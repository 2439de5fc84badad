"""Putting an adapter on a base, after a look at whether it was made for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import torch

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach, attach_hooks, find_layer
from impasto.deltas.delta import Delta
from impasto.deltas.hook import InputHook
from impasto.families.base import Base
from impasto.formats.detect import CONTEXT_WIDTHS


def apply(base: Base, adapter: Adapter, strength: float = 1.0, *, report: Reporter = SILENT) -> Applied:
    """Let the base compute with `adapter` from now on, until what is returned is detached.

    Its factors are copied to the device of the layers they belong to, where that is another one. New tokens are
    there whatever the strength. `report` gets the `notices`. Raises `UserError`, before anything is changed, for an
    adapter of another family, a layer that the base does not have, or one of another shape (both shapes are told),
    a hook on contexts, or a token of a text encoder, that it does not have.
    """
    for line in notices(base, adapter):
        report.note(line)
    deltas = {path: tuple(_placed(base, path, term) for term in terms) for path, terms in adapter.deltas.items()}
    parts: list[Part] = []
    try:
        if adapter.embeddings:
            parts.append(base.tokens.add(adapter.embeddings))
        parts.append(attach(base.components, deltas, strength))
        if adapter.hooks:
            parts.append(attach_hooks(base.components, [_moved(hook, base.device) for hook in adapter.hooks],
                                      base.key_value_layers(), strength))
    except UserError:
        Applied(parts).detach()
        raise
    return Applied(parts)


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
    """What the user may want to know: one line if the adapter was made on another checkpoint of the family, one if
    parts of it have nothing to act on here.

    Raises `UserError` for an adapter of another family, or a hook on contexts of a width that the base does not have.
    """
    if adapter.family and adapter.family != base.family:
        raise UserError(f"the adapter is for {adapter.family}, the base is {base.family}", where=base.source or "",
                        fix="take a base of the adapter's family")
    parts = {path.partition(".")[0] for path in adapter.deltas}.union(*adapter.embeddings.values())
    parts |= {base.denoiser_name} if adapter.hooks else set()
    touched = parts & adapter.base.keys() & base.components.keys()
    own = base.origin(touched)
    other = sorted(name for name in touched if own[name] != adapter.base[name])
    lines = [f"the adapter was made on another checkpoint of {base.family} ({', '.join(other)})"] if other else []
    return lines + [line for hook in adapter.hooks for line in _unused(base, hook)]


def _unused(base: Base, hook: InputHook) -> list[str]:
    """A line for a hook that also has a part for the text states of other families: A1111 offers to make it so.

    Raises `UserError` for any other width that the base does not have.
    """
    own = {width for _, _, width in base.key_value_layers()}
    strange = [width for width in hook.widths if width not in own]
    if not set(hook.widths) & own or any(width not in CONTEXT_WIDTHS for width in strange):
        raise UserError(f"the {hook.kind} is for contexts of width {_listed(strange)}, which this base does not have",
                        where=base.source or "", fix=f"its own are {_listed(sorted(own)) or 'none'}; take the base "
                        "that it was made for")
    return [f"the {hook.kind}'s part for contexts of width {_listed(strange)} is not used by this base"] if strange \
        else []


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def _placed(base: Base, path: str, term: Delta) -> Delta:
    """The term on its layer's device."""
    wanted = next(find_layer(base.components, path).parameters()).device
    first = next(term.parameters(), None)
    return term if first is None or first.device == wanted else copy.deepcopy(term).to(wanted)


def _moved(hook: InputHook, device: torch.device) -> InputHook:
    """The hook on that device."""
    first = next(hook.parameters(), None)
    return hook if first is None or first.device == device else copy.deepcopy(hook).to(device)
