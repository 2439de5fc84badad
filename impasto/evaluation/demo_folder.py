"""The folder of a demo: held by one at a time, taken up where it was interrupted, never mixed with anything else.

    demo.json  report.html  mascot.safetensors  pictures/before/  pictures/after/  and what a run's directory has

demo.json says what is shown here, how long it took so far, and, once all is done, how it went.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.core.files import disk_error, locked, write_json

TOLD = "demo.json"
LOCK = ".demo"

#: all that a demo puts into its folder, beside its adapters
OWN = (TOLD, "report.html", "pictures", "previews", "checkpoints", "tensorboard", "log.jsonl", "recipe.toml")


class Place:
    """The folder while it is held."""

    def __init__(self, folder: Path, told: dict[str, Any]) -> None:
        self.folder, self.told = folder, told

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, *, force: bool) -> Iterator[Place]:
        """Make or take up the folder, under its lock; `force`: a finished demo there may be replaced.

        Raises `UserError` for a folder of something else, one that cannot be written, and one that is in use.
        """
        _look(folder, force)  # before a lock is left in a folder that is none of ours
        with locked(folder / f"{LOCK}.lock", doing="giving a demo here",
                    fix="wait for it, or choose another folder (-o)"):
            yield cls(folder, _look(folder, force))

    def begin(self, facts: dict[str, Any], *, force: bool) -> None:
        """Go on with the demo of these facts, or begin one. Raises `UserError` if there is one of other facts."""
        facts = json.loads(json.dumps(facts))
        before = self.told.get("facts", facts)
        if before != facts and not force:
            changed = ", ".join(key for key in facts if before.get(key) != facts[key])
            raise UserError(f"holds an interrupted demo with other settings ({changed})", where=self.folder,
                            fix="the command that began it goes on with it; --force begins anew")
        if before != facts or "result" in self.told:
            self._clear(str(before["lesson"]))
        if "facts" not in self.told:
            self.told = {"facts": facts, "seconds": {}}
        self._write()

    def _clear(self, lesson: str) -> None:
        """Remove the earlier demo, and nothing else that may lie here."""
        try:
            whole = [path for path in (self.folder / lesson,) if (path / "model_index.json").is_file()]
            files = [path for ending in ("safetensors", "pt") for path in self.folder.glob(f"{lesson}*.{ending}")]
            for path in [*(self.folder / name for name in OWN), *files, *whole]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        self.told = {}

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's time to that of a phase, which several sittings may have shared."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = self.told["seconds"]
            seconds[phase] = round(seconds.get(phase, 0.0) + time.monotonic() - started, 2)
            self._write()

    @property
    def seconds(self) -> dict[str, float]:
        """The time of each phase so far."""
        return dict(self.told["seconds"])

    def finish(self, result: dict[str, Any]) -> None:
        """All is done."""
        self.told["result"] = result
        self._write()

    def _write(self) -> None:
        write_json(self.folder / TOLD, self.told)


def _look(folder: Path, force: bool) -> dict[str, Any]:
    """What demo.json there says; {} of a folder that is empty or not there."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError("is a file", where=folder, fix="choose a folder (-o)")
        held = sorted(path.name for path in folder.iterdir() if not path.name.startswith(LOCK)) \
            if folder.exists() else []
        told = json.loads((folder / TOLD).read_text(encoding="utf-8")) if TOLD in held else {}
    except OSError as error:
        raise disk_error(error, folder) from error
    except ValueError:
        told = {}
    if held and not (isinstance(told, dict) and isinstance(told.get("facts"), dict) and "seconds" in told):
        raise UserError(f"holds other things than a demo ({held[0]})", where=folder,
                        fix="choose an empty folder, or a new one (-o)")
    if "result" in told and not force:
        raise UserError("holds a demo that is finished: look at report.html", where=folder,
                        fix="choose another folder (-o), or say --force to make it anew")
    return told
