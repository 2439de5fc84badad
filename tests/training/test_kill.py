"""Killed with SIGKILL at random moments, a run ends as if it had not been: `benchmarks.kill` in small."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from impasto.training.artifacts import Artifacts
from impasto.training.journal import Journal
from impasto.training.validation import FixedDraws, Validation
from tests.training.conftest import tree
from tests.training.killing import Job, Sitting, killed, sit, straight
from tests.training.survival import lost, problems
from tests.training.test_resume import die, on_call

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")]

KILLS = 6


@pytest.fixture
def job(mini: Path, photos: Path, class_pictures: Path, tmp_path: Path) -> Job:
    """Everything that a run does on the way, on a tiny base."""
    return Job(tree(mini, photos, tmp_path, prior={"caption": "a dog", "folder": str(class_pictures)},
                    validation={"folder": str(class_pictures), "every": 2, "repeats": 2},
                    method={"dropout": 0.1}, train={"ema": 0.9, "schedule": "cosine", "warmup": 2},
                    sample={"every": 3, "steps": 2}, output={"save_every": 3}))


def test_killed_at_random_moments(job: Job, tmp_path: Path) -> None:
    whole = straight(job, tmp_path / "straight")
    assert (whole.first, whole.reached, whole.held) == (0, 6, 6)
    chance, hit = random.Random(0), 0
    for number in range(3 * KILLS):  # a moment may come too late
        folder = tmp_path / f"killed-{number}"
        sittings = killed(job, folder, whole.seconds, chance, again=0.3)
        told = f"killed in {[one.phase for one in sittings[:-1]]}"
        assert not problems(folder, tmp_path / "straight", sittings), told
        hit += sum(one.killed for one in sittings)
        if hit >= KILLS:
            return
    pytest.fail(f"only {hit} kills met the run")


#: moments of a validation, the third in all: the one after step 2, where a checkpoint is due too
MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "before its first picture": (Validation, "loss", 3, False),
    "in the midst of its pictures": (FixedDraws, "__init__", 8, False),
    "before its loss counts": (Validation, "take", 3, False),
    "before its loss is written": (Journal, "validated", 3, False),
    "after its loss is written": (Journal, "validated", 3, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_validating(job: Job, tmp_path: Path, moment: str) -> None:
    owner, name, count, after = MOMENTS[moment]
    ended_early(job, tmp_path, functools.partial(on_call, owner, name, count, die, after=after))


@pytest.mark.parametrize("after", [False, True])
def test_killed_while_the_best_is_kept(job: Job, tmp_path: Path, after: bool) -> None:
    ended_early(job, tmp_path, functools.partial(on_call, Artifacts, "save", 2, die, after=after))


def ended_early(job: Job, place: Path, arm: Callable[[], None]) -> None:
    """A run that ends since nothing gets better: killed once and started again, it ends at the same step, equal."""
    tree = {**job.tree, "validation": {**job.tree["validation"], "every": 1, "patience": 2},
            "train": {**job.tree["train"], "steps": 30, "learning_rate": 0.1}}
    job = Job(tree)
    whole = straight(job, place / "straight")
    assert 2 < whole.reached < 30, "it did not end early"
    folder = place / "killed"
    first = sit(job, folder, 0, arm=arm)
    second = sit(job, folder, 1)
    assert first.killed and not second.killed and second.reached == whole.reached
    assert not problems(folder, place / "straight", [first, second])


def test_what_is_wrong_is_seen(job: Job, tmp_path: Path) -> None:
    """Else a table of successes would say nothing."""
    whole = straight(job, tmp_path / "straight")
    folder = tmp_path / "copy"
    shutil.copytree(tmp_path / "straight", folder)
    assert not problems(folder, tmp_path / "straight", [whole])

    before = dataclasses.replace(whole, killed=True, reached=5, held=4)
    again = dataclasses.replace(whole, first=2)
    assert lost([before, again]) == 1
    assert any("step 2 while the checkpoint of step 4" in line for line in seen(folder, [before, again]))
    (folder / "run" / "previews" / ".x.png.part").touch()
    assert seen(folder, [whole]) == ["previews/.x.png.part was left"]
    (folder / "run" / "previews" / ".x.png.part").unlink()

    state = folder / "run" / "checkpoints" / "000006" / "state.safetensors"
    flip(state)
    assert any("differs in 1 tensors" in line for line in seen(folder, [whole]))
    flip(state)
    flip(folder / "run" / "previews" / "000003-0.png")
    assert seen(folder, [whole]) == ["preview 000003-0.png differs"]
    flip(folder / "run" / "previews" / "000003-0.png")
    log = folder / "run" / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n" + log.read_text(encoding="utf-8"), encoding="utf-8")
    assert seen(folder, [whole]) == ["log.jsonl has the steps [1, 1, 2, 3, 4, 5, 6]"]


def seen(folder: Path, sittings: list[Sitting]) -> list[str]:
    return problems(folder, folder.with_name("straight"), sittings)


def flip(path: Path) -> None:
    """Change the last bit of a file, or change it back."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
