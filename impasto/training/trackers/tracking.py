"""Tells a run's trackers what happens, from threads of their own: none of them can stop the training or slow it."""

from __future__ import annotations

import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from impasto.core.progress import Reporter
from impasto.training.metadata import shareable
from impasto.training.recipe import Recipe
from impasto.training.trackers import TRACKERS
from impasto.training.trackers.base import Ending, Sitting, Tracker

#: items that may wait for one tracker; figures that come on top are lost, pictures are a path each
WAITING = 10_000

#: seconds that all trackers together may take at the end of a run
PATIENCE = 75.0


class Tracking:
    """The trackers of `[output] trackers`. Raises `UserError` at once for one whose package is missing."""

    def __init__(self, recipe: Recipe, folder: Path, name: str, report: Reporter) -> None:
        kinds: dict[str, type[Tracker]] = {key: TRACKERS.get(key) for key in dict.fromkeys(recipe.output.trackers)}
        for kind in kinds.values():
            kind.check()
        self.kinds, self.every, self.report = kinds, recipe.output.track_every, report
        self.sitting = Sitting(name, folder, shareable(recipe.plain()), "", False)
        self.posts: list[Post] = []

    def begin(self, first: int) -> None:
        """Take up the run after step `first`. Nothing is sent before there is something to tell."""
        self.posts = [Post(name, kind(), self.sitting, first) for name, kind in self.kinds.items()]

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of optimizer step `step` (from 1); those of every `track_every`th are passed on."""
        for post in self.posts:
            if step % self.every == 0:
                post.put("figures", step, dict(figures))
        self._tell()

    def validation(self, step: int, loss: float) -> None:
        """The loss on held-out pictures after `step`, 0 before the first."""
        for post in self.posts:
            post.put("validation", step, loss)

    def pictures(self, step: int, prompts: Sequence[str], files: Sequence[Path]) -> None:
        """The previews after `step`."""
        for post in self.posts:
            post.put("pictures", step, list(zip(prompts, files, strict=True)))

    def end(self, ending: Ending) -> None:
        """Wait a while for what is still to be sent."""
        for post in self.posts:
            post.close(ending)
        until = time.monotonic() + PATIENCE
        if late := [post for post in self.posts if post.busy]:
            with self.report.phase(f"sending what is left to {', '.join(post.name for post in late)}"):
                while any(post.busy for post in late) and time.monotonic() < until:
                    time.sleep(0.02)
        self._tell()
        for post in self.posts:
            if post.busy:
                self.report.warn(f"{post.name} has not taken everything in within {PATIENCE:.0f} seconds, and is left "
                                 "behind; the run itself is whole")
        self.posts = []

    def _tell(self) -> None:
        """Pass on what the threads have to say; here, since a reporter belongs to the main thread."""
        for post in self.posts:
            while post.said:
                tell, line = post.said.pop(0)
                (self.report.warn if tell == "warn" else self.report.note)(line)


class Post:
    """One tracker's queue, and the thread that empties it.

    What was told is kept in the run's directory: a resumed run has the same id, and the steps that it takes again,
    which have the same figures, are not told again. A step is noted before it is sent: once each, or, where a kill
    comes between, never.
    """

    def __init__(self, name: str, tracker: Tracker, sitting: Sitting, first: int) -> None:
        self.name, self.tracker = name, tracker
        self.memory = sitting.folder / "trackers" / f"{name}.json"
        self.told = _remembered(self.memory) if first else {}
        resumed = bool(self.told)
        self.told.setdefault("id", secrets.token_hex(6))
        self.sitting = Sitting(sitting.name, sitting.folder, sitting.recipe, self.told["id"], resumed)
        self.queue: queue.Queue[tuple[str, int, Any] | Ending] = queue.Queue(WAITING)
        self.said: list[tuple[str, str]] = []
        self.thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def put(self, what: str, step: int, value: Any) -> None:
        """Pass on figures or pictures that have not been told; never waits."""
        if step <= self.told.get(what, -1):
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self.thread.start()
        if self.thread.is_alive() and not self.queue.full():
            self.queue.put_nowait((what, step, value))

    def close(self, ending: Ending) -> None:
        """Ask the thread to end."""
        if self.busy:
            try:
                self.queue.put_nowait(ending)
            except queue.Full:  # it hangs, or else there would be room
                pass

    def _work(self) -> None:
        """In the thread: whatever goes wrong is one warning. SystemExit too, which such libraries have raised."""
        try:
            if where := self.tracker.begin(self.sitting):
                self.said.append(("note", f"{self.name}: {where}"))
            while isinstance(item := self.queue.get(), tuple):
                what, step, value = item
                self.told[what] = step
                _remember(self.memory, self.told)
                send: Callable[[int, Any], None] = getattr(self.tracker, what)
                send(step, value)
            self.tracker.end(item)
        except (Exception, SystemExit) as error:
            told = " ".join(str(error).split()) or type(error).__name__
            self.said.append(("warn", f"{self.name}: {told[:300]}; the training goes on without it"))


def _remember(path: Path, told: Mapping[str, Any]) -> None:
    """Write a small file in one piece; without the wait for the disk, which each step would pay for."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told), encoding="utf-8")
    os.replace(part, path)


def _remembered(path: Path) -> dict[str, Any]:
    """What an earlier sitting told; nothing where that cannot be read."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return told if isinstance(told, dict) and isinstance(told.get("id"), str) else {}
    except (OSError, ValueError):
        return {}
