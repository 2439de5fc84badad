"""A run's curves as TensorBoard reads them: one event file a sitting, written through at once.

TensorBoard's own writer does it in a thread, where a full disk ends with a traceback beside the run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from pathlib import Path

# protobuf makes these classes when it is imported
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from impasto.core.errors import UserError
from impasto.core.files import disk_error


class Board:
    """Scalars by tag and step. A folder that cannot be written, or a full disk, is a `UserError`."""

    def __init__(self, folder: Path, first: int) -> None:
        """Begin a sitting after optimizer step `first`: TensorBoard then forgets later ones of earlier sittings."""
        self.path = folder / _name(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "xb")
        except OSError as error:
            raise disk_error(error, self.path) from error
        self.records = RecordWriter(self.file)
        try:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            self._write(Event(wall_time=time.time(), step=first + 1, session_log=SessionLog(status=SessionLog.START)))
        except UserError:
            with contextlib.suppress(UserError):
                self.close()
            raise

    def add(self, step: int, **scalars: float) -> None:
        """Write the values of a step."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Let go of the file; all that could be written is written."""
        try:
            self.file.close()
        except OSError as error:
            raise disk_error(error, self.path) from error

    def _write(self, event: Event) -> None:
        try:
            self.records.write(event.SerializeToString())
            self.file.flush()
        except OSError as error:
            raise disk_error(error, self.path) from error


def _name(folder: Path) -> str:
    """TensorBoard reads files in the order of their names, which begin with a time: this one comes last, whatever the
    clock says."""
    told = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    now = max([int(time.time()), *(int(stamp) + 1 for stamp in told if stamp.isdigit())])
    names = (f"events.out.tfevents.{now:010d}.{socket.gethostname()}.{os.getpid()}.{i}" for i in itertools.count())
    return next(name for name in names if not (folder / name).exists())
