"""Putting deltas and hooks on the layers of any `nn.Module`, and taking them off or merging them in.

A layer's `forward` is replaced on the instance: the module tree and the names in its state dict stay as they
are, and a module that was compiled before sees the change (one that is hooked does not: dynamo guards no
hooks). Attachments stack and come off in any order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError, nearest
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta, at_least_fp32
from impasto.deltas.fit import fitted
from impasto.deltas.hook import InputHook
from impasto.deltas.layers import device_of, held_in_few_bits, weight_of

Modules = Mapping[str, nn.Module] | nn.Module
M = TypeVar("M", bound=nn.Module)
Deltas = Adapter | Mapping[str, Delta] | Mapping[str, tuple[Delta, ...]]


def attach(modules: Modules, deltas: Deltas, strength: float = 1.0) -> Attachment:
    """Let layers compute (W + strength · dW) · x from now on.

    `modules` is one module, with the paths inside it, or several by name, with paths "name.path". Deltas are not
    copied: one whose parameters train is trained in place. Raises `UserError`, before anything is changed, for a
    path that is not there, a layer that cannot carry a delta, or a shape that does not fit.
    """
    given = deltas.deltas if isinstance(deltas, Adapter) else deltas
    placed = []
    for path, terms in given.items():
        terms = (terms,) if isinstance(terms, Delta) else terms
        layer = find_layer(modules, path)
        for term in terms:
            term = fitted(term, layer)
            term.check_fit(layer, path)
            placed.append((path, layer, term if strength == 1.0 else term.scaled(strength)))
    return Attachment(modules, [_put(_Placed(path, _Carrier.of(layer), term)) for path, layer, term in placed])


def attach_hooks(modules: Modules, hooks: Iterable[InputHook], layers: Iterable[tuple[str, str, int]],
                 strength: float = 1.0) -> Attached:
    """Let layers see what `hooks`, one after the other, make of their input from now on.

    `layers` are the pairs in which keys and values are made: the paths of both, as in `attach`, and the width of
    their context. Deltas on such a layer see the hooked input, whichever of the two came first. Hooks are not
    copied. A width of a hook without a layer is passed over. Raises `UserError`, before anything is changed, for a
    path that is not there.
    """
    found = [(find_layer(modules, key), find_layer(modules, value), width) for key, value, width in layers]
    placed: list[Part] = []
    for hook in hooks:
        scaled = hook if strength == 1.0 else hook.scaled(strength)
        for key, value, width in found:
            if width in hook.widths:
                placed += [_put(_Hooked(_Carrier.of(key), scaled.keys)),
                           _put(_Hooked(_Carrier.of(value), scaled.values))]
    return Attached(placed)


def find_layer(modules: Modules, path: str) -> nn.Module:
    """The layer at a path; a `UserError` if there is none. Whether it can carry a delta, the delta knows."""
    root, inside = modules, path
    if not isinstance(root, nn.Module):
        name, _, inside = path.partition(".")
        if name not in root:
            raise UserError(f"there is no {name!r} in this base", where=path, fix=nearest(name, root))
        root = root[name]
    try:
        layer = root.get_submodule(inside)
    except AttributeError:
        known = [name for name, module in root.named_modules() if not any(module.children())]
        raise UserError("there is no such layer in this base", where=path, fix=nearest(inside, known)) from None
    return layer


def beside_layers(modules: Modules, deltas: Mapping[str, tuple[Delta, ...]]) -> dict[str, tuple[Delta, ...]]:
    """The deltas on the devices of the layers that they belong to: copies, where they are on another one.

    Raises `UserError` for a path that is not there. Of a layer without weights, `attach` says what is wrong.
    """
    placed = {}
    for path, terms in deltas.items():
        device = device_of(find_layer(modules, path))
        placed[path] = terms if device is None else tuple(on_device(term, device) for term in terms)
    return placed


def on_device(module: M, device: torch.device) -> M:
    """The module on a device: a copy, where it is on another one."""
    first = next(module.parameters(), None)
    return module if first is None or first.device == device else copy.deepcopy(module).to(device)


class Switched(Protocol):
    """What can be put on a base and have no effect there: an attachment, a hook's handle."""

    @property
    def enabled(self) -> bool:
        """Whether it has effect."""
        ...

    @enabled.setter
    def enabled(self, value: bool) -> None: ...


class Part(Switched, Protocol):
    """One thing of what is put on a base."""

    def detach(self) -> None:
        """Take it off again."""
        ...


class Attached:
    """Things on a base, until `detach`. As a context manager it detaches at the end."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts, self._enabled = list(parts), True

    @property
    def enabled(self) -> bool:
        """Whether they have effect; set it to False to have the base alone (a frozen teacher)."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        for part in self._parts:
            part.enabled = value

    def detach(self) -> None:
        """Take them off. Doing it twice does no harm."""
        for part in reversed(self._parts):
            part.detach()
        self._parts = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.detach()


class Attachment(Attached):
    """Deltas on their layers, until `detach` or `merge`."""

    def __init__(self, modules: Modules, placed: list[_Placed]) -> None:
        super().__init__(placed)
        self._modules, self._placed = modules, placed

    def detach(self) -> None:
        super().detach()
        self._placed = []

    @torch.no_grad()
    def merge(self, only: Container[str] | None = None) -> None:
        """Add the deltas to the weights, in fp32, cast once; then detach.

        `only`: paths of the parameters ("unet.conv_in.weight") that are to change; those not there stay as they are.
        The weight's own tensor is changed. Raises `UserError`, before anything is changed, if another layer
        shares it (GPT-2's output layer is its token embedding), since that one would change too, if a change of a bias
        has no bias to go to, or if a weight is held in few bits, which would round the change away.
        """
        for place in self._placed:
            if kind := held_in_few_bits(place.layer):
                raise UserError(f"is held as {kind}, which would round most of the change away", where=place.path,
                                fix="keep the adapter apart, or merge it into the file, and hold that in few bits")
        self._check_unshared()
        for place in self._placed:
            if place.delta.bias() is not None and getattr(place.layer, "bias", None) is None:
                raise UserError("has no bias that a change of it could be merged into", where=place.path,
                                fix="keep the adapter apart")
        by_layer: dict[nn.Module, list[_Placed]] = {}
        for place in self._placed:
            by_layer.setdefault(place.layer, []).append(place)
        for layer, places in by_layer.items():
            path, deltas = places[0].path, [place.delta for place in places]
            if only is None or f"{path}.weight" in only:
                weight = weight_of(layer)
                wide = at_least_fp32(weight)
                weight.copy_(sum((delta.weight(wide).to(wide) for delta in deltas), start=wide))
            if only is None or f"{path}.bias" in only:
                for change in filter(lambda bias: bias is not None, (delta.bias() for delta in deltas)):
                    bias = layer.bias
                    assert isinstance(bias, Tensor) and change is not None
                    bias.copy_(at_least_fp32(bias) + change.to(bias.device))
        self.detach()

    def _check_unshared(self) -> None:
        ours = {id(place.layer.weight): place for place in self._placed}
        for root in _roots(self._modules):
            for name, module in root.named_modules():
                for parameter in module.parameters(recurse=False):
                    place = ours.get(id(parameter))
                    if place is not None and place.layer is not module:
                        raise UserError(f"shares its weight with {name}, which merging would change too",
                                        where=place.path, fix="leave this layer out, or keep the adapter apart")


def _roots(modules: Modules) -> Iterable[nn.Module]:
    return [modules] if isinstance(modules, nn.Module) else modules.values()


@dataclass(eq=False)
class _Placed:
    """One delta on one layer."""

    path: str
    carrier: _Carrier
    delta: Delta
    enabled: bool = True

    @property
    def layer(self) -> nn.Module:
        return self.carrier.layer

    def detach(self) -> None:
        """Off its layer."""
        self.carrier.remove(self)


@dataclass(eq=False)
class _Hooked:
    """A change of one layer's input."""

    carrier: _Carrier
    change: Callable[[Tensor], Tensor]
    enabled: bool = True

    def detach(self) -> None:
        """Off its layer."""
        self.carrier.remove(self)


P = TypeVar("P", _Placed, _Hooked)


def _put(place: P) -> P:
    """On its layer from now on."""
    place.carrier.add(place)
    return place


class _Carrier:
    """Stands in for a layer's forward: changes its input by the hooks, and adds the deltas that are placed on it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.placed, self.hooks = layer, list[_Placed](), list[_Hooked]()
        self.own = layer.__dict__.get("forward")  # what somebody else has put on the instance
        self.original = layer.forward
        layer.forward = self.forward

    @staticmethod
    def of(layer: nn.Module) -> _Carrier:
        """The layer's carrier, a new one if it has none."""
        carrier = getattr(layer.__dict__.get("forward"), "__self__", None)
        return carrier if isinstance(carrier, _Carrier) else _Carrier(layer)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        for hook in self.hooks:
            if hook.enabled:
                args, kwargs = _changed(hook.change, args, kwargs)
        x = args[0] if args else next(iter(kwargs.values()))  # such layers have one input
        deltas = [place.delta for place in self.placed if place.enabled]
        if len(deltas) == 1 and self.own is None:  # of somebody else's forward we do not know what it computes
            if (whole := deltas[0].instead(x, self.layer)) is not None:
                return whole
        out = plain = self.original(*args, **kwargs)
        for delta in deltas:
            out = delta.add_to(out, x, self.layer, plain)
        return out

    def add(self, place: _Placed | _Hooked) -> None:
        """Put a delta or a hook on."""
        if isinstance(place, _Hooked):
            self.hooks.append(place)
        else:
            self.placed.append(place)

    def remove(self, place: _Placed | _Hooked) -> None:
        """Take a delta or a hook off; with the last one the layer gets its own forward back.

        Where somebody has wrapped our forward since, it stays inside the wrapper, and adds nothing.
        """
        if isinstance(place, _Hooked):
            self.hooks.remove(place)
        else:
            self.placed.remove(place)
        if self.placed or self.hooks or self.layer.__dict__.get("forward") != self.forward:
            return
        if self.own is None:
            del self.layer.forward
        else:
            self.layer.forward = self.own


def _changed(change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
             ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments, of which the first is its input, with that changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name, x = next(iter(kwargs.items()))
    return args, {**kwargs, name: change(x)}
