"""What a hook is: something that changes what layers see, where a delta changes what they compute."""

from __future__ import annotations

import abc
import copy
from typing import ClassVar, Self

from torch import Tensor, nn


class InputHook(nn.Module, abc.ABC):
    """Changes the inputs of the layers that make keys and values in attention (a hypernetwork).

    Hooks chain: each sees what the one before it has left.
    """

    #: what files call such a thing
    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Numbers of features of the contexts that it changes; others pass as they are."""

    @abc.abstractmethod
    def keys(self, context: Tensor) -> Tensor:
        """What keys are made of, of a context (…, d) of one of its widths."""

    @abc.abstractmethod
    def values(self, context: Tensor) -> Tensor:
        """What values are made of, likewise."""

    @abc.abstractmethod
    def scaled(self, strength: float) -> Self:
        """The same with its change multiplied by `strength`. It shares the weights of this one."""

    def snapshot(self) -> Self:
        """A frozen copy on the CPU."""
        return copy.deepcopy(self).requires_grad_(False).cpu().eval()
