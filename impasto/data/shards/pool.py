"""Open files and connections that threads share: each is one thread's alone while it is used, and kept for the next."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Closes(Protocol):
    """What a pool keeps."""

    def close(self) -> object: ...


T = TypeVar("T", bound=Closes)


class Pool(Generic[T]):
    """At most `idle` things that are open and not in use, each under a key; the one not used for longest goes first."""

    def __init__(self, idle: int) -> None:
        self.idle = idle
        self._free: OrderedDict[tuple[Hashable, int], T] = OrderedDict()
        self._by_key: dict[Hashable, list[int]] = {}
        self._count = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    @contextlib.contextmanager
    def taken(self, key: Hashable, make: Callable[[], T]) -> Iterator[T]:
        """One under that key, made if none is free; closed instead of kept where the block raises."""
        thing = self._take(key)
        thing = make() if thing is None else thing
        try:
            yield thing
        except BaseException:
            thing.close()
            raise
        self._keep(key, thing)

    def close(self) -> None:
        """Close all that is not in use."""
        with self._lock:
            left, self._free = list(self._free.values()), OrderedDict()
            self._by_key.clear()
        for thing in left:
            thing.close()

    def _take(self, key: Hashable) -> T | None:
        with self._lock:
            numbers = self._by_key.get(key)
            if not numbers:
                return None
            number = numbers.pop()
            if not numbers:
                del self._by_key[key]
            return self._free.pop((key, number))

    def _keep(self, key: Hashable, thing: T) -> None:
        dropped = []
        with self._lock:
            self._count += 1
            self._free[key, self._count] = thing
            self._by_key.setdefault(key, []).append(self._count)
            while len(self._free) > self.idle:
                (old, number), last = self._free.popitem(last=False)
                self._by_key[old].remove(number)
                if not self._by_key[old]:
                    del self._by_key[old]
                dropped.append(last)
        for last in dropped:
            last.close()
