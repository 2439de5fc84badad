"""What is asked of a run while it trains: by a file in its directory, or by a signal.

    touch runs/dog/preview     draw the previews now
    touch runs/dog/save        write a checkpoint and an artifact now
    touch runs/dog/stop        save and end, as Ctrl-C does
    kill -USR1 PID             preview and save

Each is answered after the step that is under way, and its file removed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

NAMES = ("preview", "save", "stop")


class Requests:
    """Reads the requests of one run's directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signalled = False

    def take(self) -> frozenset[str]:
        """What has been asked for since the last call."""
        asked = {name for name in NAMES if (self.folder / name).is_file()}
        for name in asked:
            with contextlib.suppress(OSError):  # a directory that has become read-only asks again
                (self.folder / name).unlink()
        if self.signalled:
            self.signalled, asked = False, asked | {"preview", "save"}
        return frozenset(asked)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    @classmethod
    @contextlib.contextmanager
    def listening(cls, folder: Path) -> Iterator[Requests]:
        """Listen to SIGUSR1, where there is such a signal, while the block runs."""
        requests = cls(folder)
        usr1 = getattr(signal, "SIGUSR1", None)
        if usr1 is None or threading.current_thread() is not threading.main_thread():
            yield requests
            return
        former = signal.signal(usr1, requests._hear)
        try:
            yield requests
        finally:
            signal.signal(usr1, former)
