"""Putting an adapter on a base, after a look at whether it was made for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import Attached, Part, attach, attach_hooks, beside_layers, on_device
from impasto.deltas.hook import InputHook
from impasto.families.base import Base
from impasto.formats.detect import CONTEXT_WIDTHS


def apply(base: Base, adapter: Adapter, strength: float = 1.0, *, report: Reporter = SILENT) -> Attached:
    """Let the base compute with `adapter` from now on, until what is returned is detached.

    Its factors are copied to the device of the layers they belong to, where that is another one. New tokens are
    there whatever the strength. `report` gets the `notices`. Raises `UserError`, before anything is changed, for an
    adapter of another family, a layer that the base does not have, or one of another shape (both shapes are told),
    a hook on contexts, or a token of a text encoder, that it does not have.
    """
    for line in notices(base, adapter):
        report.note(line)
    deltas = beside_layers(base.components, adapter.deltas)
    parts: list[Part] = []
    try:
        if adapter.embeddings:
            parts.append(base.tokens.add(adapter.embeddings))
        parts.append(attach(base.components, deltas, strength))
        if adapter.hooks:
            parts.append(attach_hooks(base.components, [on_device(hook, base.device) for hook in adapter.hooks],
                                      base.key_value_layers(), strength))
    except UserError:
        Attached(parts).detach()
        raise
    return Attached(parts)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """A block whose errors name an adapter's file too."""
    try:
        yield
    except UserError as error:
        raise UserError(error.what, where=f"{path}: {error.where}" if error.where else path, fix=error.fix) from error


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
