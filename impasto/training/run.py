"""A run's directory: it goes from a recipe to an adapter and survives being killed at any moment.

    dog.safetensors  dog-000200.safetensors …  checkpoints/000200/  previews/  log.jsonl  recipe.toml

A checkpoint is a new folder, written aside and renamed, whose manifest is written last: it holds the digest of
every other file, and only a checkpoint whose manifest verifies counts. Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import (
    atomic_folder,
    atomic_write,
    digest,
    disk_error,
    key_of,
    locked,
    require_space,
    write_json,
)
from impasto.core.progress import SILENT, Reporter
from impasto.formats.written import holds, save_tensors

MANIFEST = "manifest.json"
STATE = "state.safetensors"

#: bytes that must stay free beside what is written
SPARE = 2**24


@dataclass
class State:
    """Where a run stands: all that the next step depends on. Draws, order and rates are functions of the step."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)


class Run:
    """The directory of one run, held by one process at a time."""

    def __init__(self, folder: Path, name: str, report: Reporter = SILENT) -> None:
        self.folder, self.name, self.report = folder, name, report

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, name: str, report: Reporter = SILENT) -> Iterator[Run]:
        """Make or take up the directory, under its lock."""
        with locked(folder / ".lock", doing="training here"):
            for leftover in folder.glob("checkpoints/*.part"):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in [*folder.glob(".*.part"), *folder.glob("previews/.*.part")]:
                with contextlib.suppress(OSError):  # it is in nobody's way
                    leftover.unlink()
            yield cls(folder, name, report)

    # --- the artifact ------------------------------------------------------------------------------------
    def artifact(self, step: int | Literal["best"] | None = None, suffix: str = ".safetensors") -> Path:
        """Where what is left goes (a folder has no suffix): after optimizer step `step`, the best, or at the end."""
        tail = "" if step is None else f"-{step}" if step == "best" else f"-{step:06d}"
        return self.folder / f"{self.name}{tail}{suffix}"

    # --- checkpoints -------------------------------------------------------------------------------------
    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, newest first, whether they verify or not."""
        folders = [p for p in (self.folder / "checkpoints").glob("*") if p.is_dir() and p.name.isdigit()]
        return sorted(folders, key=lambda p: int(p.name), reverse=True)

    def save(self, state: State, manifest: dict[str, Any], keep: int, keep_every: int = 0) -> None:
        """Write a checkpoint of `state` and read it back, then forget all but the newest `keep` ones.

        Checkpoints of every `keep_every` steps stay for good.
        """
        target = self.folder / "checkpoints" / f"{state.step:06d}"
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
        require_space(target, size + SPARE, f"the checkpoint of step {state.step}")
        if target.exists():  # one that did not verify: a valid one would have been resumed from
            shutil.rmtree(target)
        with atomic_folder(target) as folder:
            save_tensors(state.tensors, folder / STATE)
            if not holds(folder / STATE, state.tensors):
                raise UserError("was written and reads back as something else", where=target,
                                fix="the disk is failing: choose another output.dir; the checkpoint before is kept")
            whole = {**manifest, "step": state.step, "values": state.values, "files": {STATE: digest(folder / STATE)}}
            write_json(folder / MANIFEST, {**whole, "seal": _seal(whole)})
        # later ones are damaged, or the run would have gone on from them: they take nobody's place
        for old in [each for each in self.checkpoints() if int(each.name) <= state.step][keep:]:
            if keep_every and int(old.name) % keep_every == 0:
                continue
            with contextlib.suppress(OSError):  # killed in between, half of it is a leftover, not a damaged checkpoint
                old = old.rename(old.with_name(f"{old.name}.part"))
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that verifies, with its manifest; a damaged one is passed over and named."""
        for folder in self.checkpoints():
            manifest = _verified(folder)
            if manifest is None:
                self.report.warn(f"{folder} is damaged and is passed over")
                continue
            tensors = load_file(folder / STATE)
            return State(manifest["step"], tensors, manifest["values"]), manifest
        return None

    # --- the log -----------------------------------------------------------------------------------------
    def log(self, **entry: Any) -> None:
        """Append one line to log.jsonl. Raises `UserError` on a full disk; a line cut short is dropped at a resume."""
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise disk_error(error, path) from error

    def rewind_log(self, step: int) -> None:
        """Drop log lines of steps that the resumed run will take again, and a line cut short by a kill."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("step", 0) <= step:
                kept.append(line)
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def _verified(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint if it is as it was written, and so are the files that it names; else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        seal = manifest.pop("seal", None)  # older ones have none
        whole = seal in (None, _seal(manifest)) and all(
            digest(folder / name) == expected for name, expected in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return manifest if whole else None


def _seal(manifest: dict[str, Any]) -> str:
    """What a change of any value in a manifest changes."""
    return key_of(json.dumps(manifest, sort_keys=True))
