"""Ctrl-C and SIGTERM become a wish to stop that the loop reads between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopWish:
    """`asked` is the signal that came, or None. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)

    @classmethod
    @contextlib.contextmanager
    def listening(cls) -> Iterator[StopWish]:
        """Listen while the block runs; the former handlers come back after it."""
        wish = cls()
        if threading.current_thread() is not threading.main_thread():
            yield wish  # only the main thread may set handlers; whoever runs us in another listens there
            return
        former = {number: signal.signal(number, wish._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield wish
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
