"""Killed with SIGKILL at random moments, a run ends as if it had not been: `benchmarks.kill` in small."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.training.conftest import tree
from tests.training.killing import Job, Sitting, killed, straight
from tests.training.survival import lost, problems

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")]

KILLS = 6


@pytest.fixture
def job(mini: Path, photos: Path, class_pictures: Path, tmp_path: Path) -> Job:
    """Everything that a run does on the way, on a tiny base."""
    return Job(tree(mini, photos, tmp_path, prior={"caption": "a dog", "folder": str(class_pictures)},
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
