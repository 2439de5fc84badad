"""Two processes that train as one: the draws of one process with twice the batch, and its weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.training.recipe import make_recipe
from impasto.training.trainer import train
from tests.training.conftest import tree

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

ROOT = Path(__file__).parent.parent.parent


def run(folder: Path, made: dict[str, Any], processes: int, *more: str) -> subprocess.CompletedProcess:
    """Train a recipe in so many processes; each leaves its draws in folder/draws-RANK.json."""
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(made), encoding="utf-8")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = several if processes > 1 else []
    return subprocess.run([sys.executable, *launcher, "-m", "tests.training.worker", str(recipe),
                           str(folder / "draws"), *more], cwd=ROOT, capture_output=True, text=True, timeout=240)


def draws(folder: Path, rank: int) -> list[dict[str, Any]]:
    return json.loads((folder / f"draws-{rank}.json").read_text(encoding="utf-8"))


def logged(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = load_file(folder / "checkpoints" / f"{step:06d}" / "state.safetensors")
    return {name: tensor for name, tensor in state.items() if name.startswith("method.")}


@pytest.fixture
def make(mini: Path, photos: Path, tmp_path: Path):
    """A recipe over all pictures, for a batch of `batch` a process, in a directory of that name."""
    def made(name: str, batch: int, **train: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        keys = {"steps": 6, "batch_size": batch, "learning_rate": 1e-2, **train}
        return folder, tree(mini, photos, folder / "run", train=keys, data={"buckets": False})
    return made


def test_two_processes_take_the_draws_and_the_steps_of_one(make) -> None:
    sgd = {"optimizer": "torch.optim:SGD", "accumulation": 2}
    two, made = make("two", 2, **sgd)
    done = run(two, made, 2)
    assert done.returncode == 0, done.stderr
    one, made = make("one", 4, **sgd)
    assert run(one, made, 1).returncode == 0
    first, second, alone = draws(two, 0), draws(two, 1), draws(one, 0)

    def key(entry: dict[str, Any]) -> tuple[int, int]:
        return entry["step"], entry["sample"]

    assert sorted([*first, *second], key=key) == sorted(alone, key=key)
    assert not {key(entry) for entry in first} & {key(entry) for entry in second}
    assert not {entry["noise"] for entry in first} & {entry["noise"] for entry in second}
    mine, theirs = weights(two / "run", 6), weights(one / "run", 6)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-5)
    assert len(logged(two / "run")) == 6  # one writer


@pytest.mark.slow
def test_adamw_has_the_losses_of_one_process(make) -> None:
    two, made = make("two", 2, steps=20, learning_rate=1e-3)
    assert run(two, made, 2).returncode == 0
    one, made = make("one", 4, steps=20, learning_rate=1e-3)
    assert run(one, made, 1).returncode == 0
    assert logged(two / "run") == pytest.approx(logged(one / "run"), rel=1e-4)


def test_resume_is_exact_in_as_many_processes_and_takes_the_same_draws_in_one(make) -> None:
    straight, made = make("straight", 2)
    assert run(straight, made, 2).returncode == 0
    killed, made = make("killed", 2)
    lost = run(killed, made, 2, "3")  # the second process is killed in step 4; checkpoints are at 2, 4, 6
    assert lost.returncode != 0
    died = float((killed / "draws-died").read_text(encoding="utf-8"))
    assert time.time() - died < 60, "a lost process is noticed within a minute"
    assert run(killed, made, 2).returncode == 0
    assert min(entry["step"] for entry in draws(killed, 0)) == 2, "went on after the checkpoint"
    mine, theirs = weights(killed / "run", 6), weights(straight / "run", 6)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    fewer, made = make("fewer", 2)
    assert run(fewer, made, 2, "3").returncode != 0
    made["train"]["batch_size"] = 4
    assert run(fewer, made, 1).returncode == 0
    expected = [entry for rank in (0, 1) for entry in draws(straight, rank) if entry["step"] >= 2]
    assert sorted(map(str, draws(fewer, 0))) == sorted(map(str, expected))
    for name, tensor in weights(fewer / "run", 6).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)


def test_what_one_cannot_do_ends_all_with_a_message(make, tmp_path: Path) -> None:
    folder, made = make("bad", 2)
    made["data"]["folder"] = str(tmp_path / "nowhere")
    done = run(folder, made, 2)
    assert done.returncode != 0 and "nowhere" in done.stderr


def test_another_batch_in_all_is_refused(make) -> None:
    _, made = make("other", 2, steps=2)
    train(make_recipe(made))
    made["train"] |= {"batch_size": 3, "steps": 4}
    with pytest.raises(UserError, match=r"batches of 2 pictures in all processes -> 3"):
        train(make_recipe(made))
