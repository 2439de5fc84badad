"""A run's directory: only whole checkpoints count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from impasto.core.errors import UserError
from impasto.training.kept_recipe import compare_recipe, keep_recipe
from impasto.training.recipe import Recipe
from impasto.training.run import Run, State
from impasto.training.trainer import train
from tests.heard import Heard


def state(step: int) -> State:
    return State(step, {"w": torch.full((3,), float(step))}, {"scaler": {}})


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    heard = Heard()
    with Run.open(tmp_path / "r", "dog", heard) as run:
        for step in (1, 2, 3):
            run.save(state(step), {"total": 5}, keep=2)
        assert [p.name for p in run.checkpoints()] == ["000003", "000002"]
        with open(run.checkpoints()[0] / "state.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        found = run.latest()
    assert found is not None and found[0].step == 2 and torch.equal(found[0].tensors["w"], torch.full((3,), 2.0))
    assert len(heard.warnings) == 1 and "000003 is damaged" in heard.warnings[0]


@pytest.mark.parametrize("damage", ["no manifest", "cut manifest", "no state", "a folder half-written"])
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, damage: str) -> None:
    with Run.open(tmp_path / "r", "dog") as run:
        run.save(state(1), {}, keep=2)
        run.save(state(2), {}, keep=2)
        newest = run.checkpoints()[0]
        if damage == "no manifest":
            (newest / "manifest.json").unlink()
        elif damage == "cut manifest":
            (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:20])
        elif damage == "no state":
            (newest / "state.safetensors").unlink()
        else:
            newest.rename(newest.with_name("000002.part"))
    with Run.open(tmp_path / "r", "dog") as run:
        found = run.latest()
        assert found is not None and found[0].step == 1
        run.save(state(2), {}, keep=2)  # the damaged one is replaced
        again = run.latest()
        assert again is not None and again[0].step == 2
    assert not list((tmp_path / "r").rglob("*.part"))


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", "dog") as run:
        for step in (4, 6):
            run.save(state(step), {}, keep=2)
        (run.checkpoints()[0] / "state.safetensors").write_bytes(b"")
        found = run.latest()
        assert found is not None and found[0].step == 4
        run.save(state(5), {}, keep=1)  # stopped before it came to step 6 again
        found = run.latest()
        assert found is not None and found[0].step == 5


def test_leftovers_of_a_kill_are_cleared(tmp_path: Path) -> None:
    names = [".dog.safetensors.x.part", "previews/.000004-0.png.x.part", "checkpoints/000002.part/state.safetensors"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    with Run.open(tmp_path, "dog"):
        assert not list(tmp_path.rglob("*.part"))


def test_an_old_checkpoint_is_whole_until_it_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, **keywords: bool) -> None:
        if path.exists() and path.name.startswith("000001"):
            (path / "manifest.json").unlink()
            raise KeyboardInterrupt

    heard = Heard()
    with Run.open(tmp_path / "r", "dog", heard) as run:
        run.save(state(1), {}, keep=1)
        monkeypatch.setattr("impasto.training.run.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(state(2), {}, keep=1)
        monkeypatch.undo()
    with Run.open(tmp_path / "r", "dog", heard) as run:
        assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["000002"]


def test_another_recipe_is_refused_by_key(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", "dog") as run:
        plain = {"train": {"steps": 5, "learning_rate": 1e-4, "epochs": None}, "method": [{"kind": "lora", "rank": 4}]}
        keep_recipe(run, plain, 0)
        run.save(state(1), {}, keep=2)
        compare_recipe(run, {**plain, "train": {**plain["train"], "steps": 9}})
        with pytest.raises(UserError, match="another recipe .*method.0.rank 4 -> 8"):
            compare_recipe(run, {**plain, "method": [{"kind": "lora", "rank": 8}]})
        compare_recipe(run, {**plain, "train": {**plain["train"], "rates": {}}})  # says nothing
        with pytest.raises(UserError, match="another recipe .*train.rates.unet None -> "):
            compare_recipe(run, {**plain, "train": {**plain["train"], "rates": {"unet": 1e-5}}})


def test_the_log_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", "dog") as run:
        for step in range(1, 6):
            run.log(step=step)
        with open(run.folder / "log.jsonl", "a") as file:
            file.write('{"step": 6, "lo')  # what a kill leaves
        run.rewind_log(3)
    lines = (tmp_path / "r" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_key_that_came_with_a_newer_version_is_no_change(recipe: Callable[..., Recipe]) -> None:
    made = recipe(train={"steps": 2})
    train(made)
    path = Path(made.output.dir) / "recipe.toml"
    kept = path.read_text(encoding="utf-8")
    older = [line for line in kept.splitlines() if not line.startswith(("ema ", "keep_every ", "init "))]
    assert len(older) < len(kept.splitlines())
    path.write_text("\n".join(older), encoding="utf-8")
    assert train(recipe(train={"steps": 4})).resumed_from == 2
    with pytest.raises(UserError, match="another recipe .train.ema 0.0 -> 0.5"):
        train(recipe(train={"steps": 6, "ema": 0.5}))
