"""A network whose weights are let go, and read again from its checkpoint as soon as one of them is looked at.

After captions and pictures are encoded nobody needs text encoders and VAE but for previews: of SD 3 they are 11 GB.
What the checkpoint holds need not be held a second time: in the place of each module's weights stands a dictionary that
knows their names alone, and puts all of the network's weights back before it gives one away. So nothing can meet a
weight that is not there; paths, layers and configurations are there all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from impasto.families.networks import like, places
from impasto.families.quantised import Quantised, quantised_layers

#: makes the network's tensors, by name, one at a time; raises `UserError` where they are no longer what they were
Read = Callable[[], Iterable[tuple[str, Tensor]]]


class Asleep:
    """One network without its weights, until one of them is asked for."""

    def __init__(self, network: nn.Module, read: Read, device: torch.device) -> None:
        """Let the network's weights go. `device`: where they will be, once read again, in the types that they have."""
        self.network, self.read, self.device = network, read, device
        self.count = sum(parameter.numel() for parameter in network.parameters())
        for held, leaf in places(network).values():
            held[leaf] = like(held[leaf], torch.empty_like(held[leaf], device="meta"))
        for layer in quantised_layers(network).values():
            assert isinstance(layer, nn.Module)
            layer._buffers |= {name: None if part is None else torch.empty_like(part, device="meta")
                               for name, part in layer._buffers.items()}
        self._own: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._hide()

    @property
    def woken(self) -> bool:
        """Whether its weights are there again."""
        return not self._own

    def _hide(self) -> None:
        for module in self.network.modules():
            if module._parameters or module._buffers:
                self._own.append((module, module._parameters, module._buffers))
        for module, parameters, buffers in self._own:
            module._parameters, module._buffers = _Hidden(self, parameters), _Hidden(self, buffers)

    def _show(self) -> None:
        for module, parameters, buffers in self._own:
            module._parameters, module._buffers = parameters, buffers
        self._own = []

    @torch.no_grad()
    def wake(self) -> None:
        """Read the weights again. Raises `UserError` where they are not what they were; it then sleeps on."""
        if self.woken:
            return
        self._show()
        try:
            missing, packed = places(self.network), quantised_layers(self.network)
            for name, tensor in self.read():
                if name in missing:
                    held, leaf = missing.pop(name)
                    held[leaf] = like(held[leaf], tensor.to(self.device, held[leaf].dtype))
                elif name in packed:
                    layer: Quantised = packed.pop(name)
                    layer.take(tensor.to(self.device), layer.dtype)
            assert not missing and not packed, "a checkpoint has what was loaded from it"
        except BaseException:
            self._hide()
            raise


class _Hidden(dict[str, Any]):
    """A module's weights, or buffers, by name: any look at one of them wakes the network.

    Each method that gives, takes or changes a value is the real dictionary's, which by then is in its place.
    """

    def __init__(self, asleep: Asleep, real: dict[str, Any]) -> None:
        super().__init__(dict.fromkeys(real))
        self._asleep, self._real = asleep, real

    def _awake(self) -> dict[str, Any]:
        self._asleep.wake()
        return self._real

    def __getitem__(self, name: str) -> Any:
        return self._awake()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._awake()[name] = value

    def __delitem__(self, name: str) -> None:
        del self._awake()[name]

    def __iter__(self) -> Iterator[str]:  # our own, so that a copy of it is made by way of __getitem__
        return super().__iter__()

    def __or__(self, other: Any) -> Any:
        return self._awake() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._awake()

    def __eq__(self, other: object) -> bool:
        return self._awake() == other

    def __reduce__(self) -> Any:
        return dict, (dict(self._awake()),)

    def get(self, name: str, default: Any = None) -> Any:
        return self._awake().get(name, default)

    def items(self) -> Any:
        return self._awake().items()

    def values(self) -> Any:
        return self._awake().values()

    def copy(self) -> Any:
        return self._awake().copy()

    def pop(self, *args: Any) -> Any:
        return self._awake().pop(*args)

    def popitem(self) -> Any:
        return self._awake().popitem()

    def setdefault(self, name: str, default: Any = None) -> Any:
        return self._awake().setdefault(name, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._awake().update(*args, **kwargs)

    def clear(self) -> None:
        self._awake().clear()
