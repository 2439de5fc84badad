"""Items that are too many to be held: what a run asks of all of them at once, answered without making each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from impasto.data.options import ValidationOptions

if TYPE_CHECKING:
    from impasto.data.items import Item


@dataclass(frozen=True)
class Tally:
    """What is counted of pictures. Each "most" comes with its picture's name."""

    count: int
    shapes: Mapping[tuple[int, int], int]  # pictures by bucket
    cropped_mean: float
    cropped_most: tuple[float, str]
    enlarged: int
    enlarged_most: tuple[float, str]
    own: int  # in a bucket of their own size
    copies: int
    fewer: int = 0  # that come at fewer resolutions than others


class Stream(Protocol):
    """An endless stream of micro-batches, as `order.Order` is one."""

    @property
    def epoch_length(self) -> int:
        """Micro-batches in an epoch."""
        ...

    def micro_batch(self, index: int) -> Sequence[int]:
        """The places of the items in the stream's micro-batch `index`."""
        ...


class Many(Sequence["Item"]):
    """A sequence whose items are made when they are asked for, one at a time: those of a run's only set."""

    @abstractmethod
    def order(self, group: int, seed: int, stream: str) -> Stream:
        """The order of micro-batches of `group` items: a function of (seed, epoch)."""

    @abstractmethod
    def tally(self, buckets: Sequence[tuple[int, int]]) -> Tally:
        """What `account` tells of them."""

    @property
    @abstractmethod
    def facts(self) -> str:
        """A digest of contents, captions and cuts, in order."""

    @abstractmethod
    def divided(self, own: Sequence[Item] | None, options: ValidationOptions,
                seed: int) -> tuple[Self, Sequence[Item], list[str]]:
        """As `heldout.divide`."""

    @abstractmethod
    def keyed(self, keying: Callable[[Item], Item]) -> Self:
        """The same items, each as `keying` returns it."""
