"""Runs that are killed with SIGKILL at any moment and started again: how, and what they were doing.

A *sitting* is one start of the program, up to its end or a kill. It keeps a diary outside the run's directory: the
phase that it is in, and the step it has reached. `survival.py` has what must be true in the end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from impasto.core.files import digest
from impasto.core.progress import Advance, Reporter
from impasto.training import trainer
from impasto.training.artifacts import Artifacts
from impasto.training.recipe import make_recipe
from impasto.training.run import MANIFEST, Run

ROOT = Path(__file__).parent.parent.parent

#: seconds within which the others have ended when one of several processes is killed
MINUTE = 60.0

#: imported once, by the process that all sittings are forked from; `impasto` itself imports them when it needs them
LATE = ["impasto.families.sd1", "impasto.formats.kohya", "impasto.methods.lora", "impasto.objectives.denoise",
        "impasto.families.sampling", "impasto.families.schedulers", "impasto.mini.lessons",
        "impasto.formats.configs.sd1", "torch._dynamo", "impasto.training.board"]


@dataclass(frozen=True)
class Job:
    """What is started again and again: a recipe as nested dictionaries, in so many processes."""

    tree: dict[str, Any]
    processes: int = 1


@dataclass(frozen=True)
class Sitting:
    """How one start went."""

    killed: bool
    phase: str  # what it was doing last
    first: int | None  # the steps that it began with; None if it did not come to training
    reached: int  # steps taken when it ended
    held: int  # steps in the newest checkpoint whose manifest verifies, afterwards
    seconds: float  # Python's own imports left out
    slowest: float = 0.0  # seconds until all processes had ended after one was killed


def straight(job: Job, folder: Path) -> Sitting:
    """The run that nobody kills."""
    if job.processes == 1:
        _fork(time.monotonic).join()  # the first one waits for the imports
    sitting = sit(job, folder, 0)
    assert not sitting.killed
    return sitting


def killed(job: Job, folder: Path, seconds: float, chance: random.Random, again: float = 0.0) -> list[Sitting]:
    """Kill a run at a moment within `seconds` of its start, and start it until it ends.

    Each further sitting is killed too with probability `again`. The first one alone, not killed, if it was faster.
    """
    sittings: list[Sitting] = []
    while not sittings or sittings[-1].killed:
        dies = not sittings or chance.random() < again
        sittings.append(sit(job, folder, len(sittings), chance.uniform(0, seconds) if dies else None,
                            chance.randrange(job.processes)))
    return sittings


def sit(job: Job, folder: Path, number: int, dies: float | None = None, rank: int = 0,
        arm: Callable[[], None] | None = None) -> Sitting:
    """Start the run in `folder`/run once; kill it after `dies` seconds, or one of its processes. `arm`, which is
    pickled, is called in the process before the run, and may see to it that it kills itself.

    Caches lie in `folder`/cache, empty at first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = {"tree": {**job.tree, "output": {**job.tree.get("output", {}), "dir": str(folder / "run")}},
            "diary": str(folder / f"diary-{number}"), "cache": str(folder / "cache")}
    if job.processes == 1:
        dead, seconds, slowest = _alone(task, dies, arm)
    else:
        dead, seconds, slowest = _together(task, folder / "task.json", job.processes, dies, rank)
    lines = read_diary(Path(task["diary"]))
    steps = [step for _, step in lines if step is not None]
    return Sitting(dead, lines[-1][0], steps[0] if steps else None, max(steps, default=0), newest(folder / "run"),
                   seconds, slowest)


def _alone(task: dict[str, Any], dies: float | None, arm: Callable[[], None] | None) -> tuple[bool, float, float]:
    """One process. Whether it was killed, and its seconds; no others had to end."""
    started = time.monotonic()
    process = _fork(train, **task, arm=arm)
    process.join(dies)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode in (0, -9), f"ended with {process.exitcode}"
    return process.exitcode != 0, time.monotonic() - started, 0.0


def _fork(what: Callable[..., Any], **keywords: Any) -> BaseProcess:
    """A process, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LATE])
    process = context.Process(target=what, kwargs=keywords)
    process.start()
    return process


def _together(task: dict[str, Any], note: Path, processes: int, dies: float | None, rank: int
              ) -> tuple[bool, float, float]:
    """Several processes under torchrun. Whether one was killed, the seconds until then, and until all had ended."""
    note.write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "-m", "tests.training.killing", str(note)]
    with open(note.with_name("errors.txt"), "ab") as errors:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors)
    workers: list[psutil.Process] = []
    try:
        while launcher.poll() is None and not Path(task["diary"]).exists():  # it imports
            time.sleep(0.05)
        started, clock = time.monotonic(), time.time()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(dies)
        while launcher.poll() is None and len(workers := _workers(launcher.pid)) < processes:
            time.sleep(0.05)
        if launcher.returncode is not None:
            assert launcher.returncode == 0, note.with_name("errors.txt").read_text(encoding="utf-8")[-2000:]
            return False, Path(task["diary"]).stat().st_mtime - clock, 0.0  # without the launcher's own end
        workers[rank].kill()
        died = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(2 * MINUTE)
        psutil.wait_procs(workers, MINUTE)
        return launcher.returncode != 0, died - started, time.monotonic() - died
    finally:
        for process in [*(workers or _workers(launcher.pid)), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()


def _workers(launcher: int) -> list[psutil.Process]:
    """The launcher's processes, by their rank."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, KeyError):
                found[int(process.environ()["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


# --- inside a sitting ----------------------------------------------------------------------------------
def train(tree: dict[str, Any], diary: str, cache: str, arm: Callable[[], None] | None = None) -> None:
    """What a sitting does; `arm` comes first."""
    torch.set_num_threads(1)
    if arm is not None:
        arm()
    os.environ["IMPASTO_CACHE"] = cache
    report = Diary(Path(diary if os.environ.get("RANK", "0") == "0" else os.devnull))
    _tell(Artifacts, "save", "artifact", report)
    _tell(Run, "save", "checkpoint", report)
    trainer.train(make_recipe(tree), report)


def _tell(owner: Any, name: str, title: str, report: Reporter) -> None:
    """Make a phase of a method that is too short to be one for users."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        with report.phase(title):
            return plain(*args, **keywords)

    setattr(owner, name, wrapped)


class Diary(Reporter):
    """Writes a line whenever a phase or step begins or ends; what is written outlives a kill."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.phases: list[str] = []
        self.step: int | None = None
        self._write()

    @contextlib.contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        title = re.sub(r" at step \d+", "", title)

        def advance(n: int = 1, status: str = "") -> None:
            if title == "training":
                self.step = (self.step or 0) + n
                self._write()

        self.phases.append(title)
        self._write()
        yield advance
        self.phases.pop()
        self._write()

    def _write(self) -> None:
        outside = "between phases, before training" if self.step is None else "ending"
        os.write(self.file, json.dumps([self.phases[-1] if self.phases else outside, self.step]).encode() + b"\n")


def read_diary(path: Path) -> list[tuple[str, int | None]]:
    """Phases and steps of one sitting; one that did not come to its first line was starting."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [("starting", None), *(tuple(json.loads(line)) for line in lines)]


def newest(run: Path) -> int:
    """The steps in the newest checkpoint whose files are all as its manifest says; 0 if there is none."""
    return max((int(folder.name) for folder in run.glob("checkpoints/*")
                if folder.name.isdigit() and verifies(folder)), default=0)


def verifies(checkpoint: Path) -> bool:
    """Whether there is a manifest, and all that it names is there and has the digest that it tells."""
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        return False
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return all((checkpoint / name).exists() and digest(checkpoint / name) == told for name, told in files.items())


if __name__ == "__main__":
    train(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
