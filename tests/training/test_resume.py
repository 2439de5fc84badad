"""Exact resume: killed with -9 at any moment, the same command ends bit-equal and repeats no saved step."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from impasto.core import files
from impasto.training import artifacts, trainer
from impasto.training import run as run_module
from impasto.training.recipe import Recipe, make_recipe
from tests.training.conftest import tree

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")


def die(*args: Any, **keywords: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(tensors: dict, path: Path) -> None:
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{half")
    die()


def on_call(owner: Any, name: str, count: int, action: Callable[..., None], *, after: bool = False) -> None:
    """Let `owner.name` work until its `count`-th call, then act before it, or after it."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] != count:
            return original(*args, **keywords)
        if not after:
            return action(*args, **keywords)
        result = original(*args, **keywords)
        action()
        return result

    setattr(owner, name, wrapped)


#: moment -> how to be killed there, and the step of the last checkpoint that must then hold (saves at 2, 4, 6)
MOMENTS: dict[str, tuple[Callable[[], None], int]] = {
    "in step 2, before the first checkpoint": (lambda: on_call(trainer.Trainer, "_accumulate", 2, die), 0),
    "before the first step": (lambda: on_call(trainer.Trainer, "_accumulate", 1, die), 0),
    "in step 4, before any save of it": (lambda: on_call(trainer.Trainer, "_update", 4, die), 2),
    "before the save at 4": (lambda: on_call(run_module.Run, "save", 2, die), 2),
    "with half of a state file": (lambda: on_call(run_module, "save_tensors", 2, die_half_written), 2),
    "before the manifest": (lambda: on_call(run_module, "write_json", 2, die), 2),
    "before the rename": (lambda: on_call(files.os, "rename", 2, die), 2),
    "after the rename": (lambda: on_call(files.os, "rename", 2, die, after=True), 4),
    "after the save at 4": (lambda: on_call(run_module.Run, "save", 2, die, after=True), 4),
    "in step 5": (lambda: on_call(trainer.Trainer, "_accumulate", 5, die), 4),
    "after the last checkpoint, before the artifact": (lambda: on_call(artifacts, "save_arranged", 1, die), 6),
    "while the artifact is read back": (lambda: on_call(artifacts, "save_arranged", 1, die, after=True), 6),
    "while pictures are cached": (lambda: on_call(trainer, "prepare_source", 1, die, after=True), 0),
}
QUICK = ["in step 2, before the first checkpoint", "in step 4, before any save of it", "before the manifest",
         "after the rename", "after the last checkpoint, before the artifact"]


def child(plain: dict[str, Any], moment: str | None) -> None:
    torch.set_num_threads(1)
    if moment is not None:
        MOMENTS[moment][0]()
    trainer.train(make_recipe(plain))


def spawn(recipe: Recipe, moment: str | None = None) -> int:
    """Train in another process; its exit code (-9 if killed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_resume"])
    process = context.Process(target=child, args=(recipe.plain(), moment))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


SECTIONS: dict[str, Any] = dict(
    method={"dropout": 0.1, "targets": ["attention", "convolutions", "text-encoder"]},
    train={"accumulation": 2, "schedule": "cosine", "warmup": 2},
    objective={"noise_offset": 0.05}, data={"flip": True})


@pytest.fixture(scope="module")
def straight(mini: Path, photos: Path, class_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of the run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    made = make_recipe(tree(mini, photos, folder, prior=prior(class_pictures), **SECTIONS))
    assert spawn(made) == 0
    return made.output.dir


def prior(folder: Path) -> dict[str, str]:
    return {"caption": "a dog", "folder": str(folder)}


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {**load_file(Path(folder) / "dog.safetensors"),
            **load_file(Path(folder) / "checkpoints" / "000006" / "state.safetensors")}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("moment", [
    pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MOMENTS])
def test_killed_and_resumed_equals_uninterrupted(recipe: Callable[..., Recipe], class_pictures: Path, straight: str,
                                                 moment: str) -> None:
    killed = recipe("killed", prior=prior(class_pictures), **SECTIONS)
    assert spawn(killed, moment) == -signal.SIGKILL
    held = MOMENTS[moment][1]
    assert spawn(killed) == 0
    assert_equal(tensors(straight), tensors(killed.output.dir))

    log = entries(killed.output.dir)
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == list(range(1, 7))  # none missing, none twice
    resumed = [entry["step"] for entry in log if entry.get("event") == "resumed"]
    assert resumed == ([held] if held else [])
    assert [e["loss"] for e in entries(straight) if "loss" in e] == [e["loss"] for e in log if "loss" in e]


def entries(folder: str) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_within_a_step_and_the_same_command_goes_on(recipe: Callable[..., Recipe],
                                                                   number: signal.Signals,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = recipe("whole"), recipe("stopped")
    trainer.train(whole)
    with monkeypatch.context() as patch:
        original = trainer.Trainer._update

        def update(self: trainer.Trainer, step: int) -> float:
            if step == 2:
                os.kill(os.getpid(), number)
            return original(self, step)

        patch.setattr(trainer.Trainer, "_update", update)
        outcome = trainer.train(stopped)
    assert outcome.stopped_by == number and outcome.step == 3 and outcome.artifact is None
    outcome = trainer.train(stopped)
    assert outcome.resumed_from == 3 and outcome.step == 6
    assert_equal(tensors(whole.output.dir), tensors(stopped.output.dir))


def test_a_finished_run_does_nothing_again_and_can_be_made_longer(recipe: Callable[..., Recipe]) -> None:
    trainer.train(recipe("short"))
    again = trainer.train(recipe("short"))
    assert again.resumed_from == again.step == 6 and again.loss is None
    trainer.train(recipe("long", train={"steps": 9}))
    longer = trainer.train(recipe("short", train={"steps": 9}))
    assert longer.resumed_from == 6 and longer.step == 9
    a, b = (load_file(Path(recipe(name).output.dir) / "dog.safetensors") for name in ("short", "long"))
    assert_equal(a, b)
