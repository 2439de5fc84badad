"""The weights of a base's networks: as the checkpoint has them, merged into, trained, or asleep.

What a base computes is its family's; what its components are made of is told here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.core.files import key_of
from impasto.deltas.attach import attach, beside_layers
from impasto.deltas.delta import Delta

if TYPE_CHECKING:
    from impasto.families.asleep import Asleep
    from impasto.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Merged:
    """An adapter in a base's weights."""

    name: str  # of its file
    digest: str  # of what it holds
    strength: float
    components: frozenset[str]  # that it changed
    deltas: Mapping[str, tuple[Delta, ...]] = field(repr=False, compare=False)  # by layer, at full strength


class Weights:
    """What holds components, and knows where their weights are from. `families.base.Base` is one."""

    #: the fields of a base that this is about: see there
    components: dict[str, nn.Module]
    checkpoints: dict[str, Checkpoint]
    quantised: dict[str, str]
    asleep: dict[str, Asleep]
    merged: tuple[Merged, ...]

    @property
    def device(self) -> torch.device:
        """The denoiser's."""
        raise NotImplementedError

    @functools.cached_property
    def _first(self) -> dict[str, str]:
        """What `origin` told of each component when it was first asked."""
        return {}

    def layer(self, path: str) -> nn.Module:
        """The layer at "component.path.inside"."""
        component, _, inside = path.partition(".")
        return self.components[component].get_submodule(inside)

    def parameter(self, path: str) -> nn.Parameter:
        """The parameter at "component.path.inside.weight"."""
        component, _, inside = path.partition(".")
        return self.components[component].get_parameter(inside)

    @torch.no_grad()
    def hold(self, paths: Iterable[str], dtype: torch.dtype) -> None:
        """Hold these parameters in `dtype` from now on, whatever precision the base was loaded in.

        Their values are the checkpoint's own again: what loading has rounded comes back, and onto that, what was merged
        into them since. Random ones are cast.
        """
        wanted: dict[str, dict[str, nn.Parameter]] = {}
        for path in paths:
            component, _, inside = path.partition(".")
            if (parameter := self.parameter(path)).dtype != dtype:
                wanted.setdefault(component, {})[inside] = parameter
        for component, parameters in wanted.items():
            if component not in self.checkpoints:
                for parameter in parameters.values():
                    parameter.data = parameter.data.to(dtype)  # diffusers warns of `Module.to`
                continue
            for name, tensor in self.stored(component):
                if name in parameters:
                    parameters[name].data = tensor.to(parameters[name].device, dtype)
            self._merge_again({f"{component}.{name}" for name in parameters})

    def _merge_again(self, paths: set[str]) -> None:
        """Put the merged adapters' changes onto these parameters, of the checkpoint's values, and onto no others."""
        layers = {path.rpartition(".")[0] for path in paths}
        for each in self.merged:
            deltas = {layer: terms for layer, terms in each.deltas.items() if layer in layers}
            attach(self.components, beside_layers(self.components, deltas), each.strength).merge(only=paths)

    def precision(self, component: str) -> str:
        """What a component is held and computes in: its type, and how it is held if that is in few bits. For keys of
        what it has made."""
        held = self.quantised.get(component)
        return str(next(self.components[component].parameters()).dtype) + (f", {held}" if held else "")

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by path: all others are what the checkpoint has, up to the precision in use."""
        return {f"{name}.{path}": parameter for name, network in self.components.items() if not self._sleeps(name)
                for path, parameter in network.named_parameters() if parameter.requires_grad}

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """A component's tensors as its checkpoint has them, by name, one at a time.

        Raises `UserError` if that is no longer there.
        """
        checkpoint = self.checkpoints[component]
        try:
            yield from checkpoint.tensors(component)
        except OSError as error:
            raise UserError(f"can no longer be read ({error.strerror or error})", where=checkpoint.path,
                            fix="put the base back to where it was") from error

    def fingerprint(self, components: Iterable[str] | None = None) -> dict[str, str]:
        """What identifies each component's weights: that of the checkpoint, and what was merged into them since.

        Encodings and drawn pictures are kept under it. A component without a merged adapter has its `origin`.
        """
        found = self.origin(components)
        for name in found:
            if own := [(each.digest, each.strength) for each in self.merged if name in each.components]:
                found[name] = key_of("merged", found[name], own)
        return found

    def origin(self, components: Iterable[str] | None = None) -> dict[str, str]:
        """blake2b of each component's tensors in diffusers' naming: one for all layouts of the same weights.

        Of the weights as the checkpoint holds them, whatever precision they are used in and is merged into them.
        """
        from impasto.families.fingerprint import fingerprint, of_module

        found = {name: fingerprint(self.checkpoints[name], name) if name in self.checkpoints
                 else of_module(self.components[name])
                 for name in (self.components if components is None else components)}
        for name, own in found.items():
            self._first.setdefault(name, own)
        return found

    # --- sleep ---------------------------------------------------------------------------------------
    def sleep(self, components: Iterable[str]) -> None:
        """Put components to sleep that nobody needs now.

        One that is what its checkpoint holds, up to precision, is let go: its weights are read again from there, to the
        denoiser's device, as soon as one of them is looked at (see `asleep`). That raises `UserError` if the checkpoint
        has changed since it was loaded. Any other is moved to the CPU, and what it is asked for is computed there.
        """
        from impasto.families.asleep import Asleep

        for name in components:
            if self._sleeps(name):
                continue
            if self._can_be_read(name):
                self.asleep[name] = Asleep(self.components[name], functools.partial(self._read_again, name),
                                           self.device)
            else:
                self.components[name].to("cpu")

    @contextlib.contextmanager
    def awake(self, components: Iterable[str] | None = None) -> Iterator[None]:
        """A block in which components, or all, may be asked for anything, on the denoiser's device; afterwards those
        that slept do so again."""
        names = [*(self.components if components is None else components)]
        away = {name: place for name in names if not self._sleeps(name) and
                (place := next(self.components[name].parameters()).device) != self.device}
        sleeping = [name for name in names if self._sleeps(name)]
        for name in away:
            self.components[name].to(self.device)
        try:
            yield
        finally:
            for name, place in away.items():
                self.components[name].to(place)
            self.sleep(sleeping)

    def awake_networks(self) -> list[nn.Module]:
        """The networks whose weights are there."""
        return [network for name, network in self.components.items() if not self._sleeps(name)]

    def numbers(self, component: str) -> int:
        """How many a component's parameters hold; whether it sleeps or not."""
        return self.asleep[component].count if self._sleeps(component) else \
            sum(parameter.numel() for parameter in self.components[component].parameters())

    def _sleeps(self, name: str) -> bool:
        return name in self.asleep and not self.asleep[name].woken

    def _can_be_read(self, name: str) -> bool:
        """Whether a component is what its checkpoint holds, and that is what it was when it was first looked at."""
        return name in self.checkpoints and not any(name in each.components for each in self.merged) and \
            not any(parameter.requires_grad for parameter in self.components[name].parameters()) and \
            self._is_first(name)

    def _is_first(self, name: str) -> bool:
        try:
            return self.origin([name])[name] == self._first[name]
        except OSError:
            return False

    def _read_again(self, name: str) -> Iterator[tuple[str, Tensor]]:
        if not self._is_first(name):
            raise UserError(f"its {name}, which is needed again, is not what it was when this began",
                            where=self.checkpoints[name].path, fix="put the base back to where and what it was")
        return self.stored(name)
