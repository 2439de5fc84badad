"""A run's directory: only whole checkpoints count, and optimizer state comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from impasto.core.errors import UserError
from impasto.core.progress import Reporter
from impasto.training.optimizers import make_optimizer
from impasto.training.recipe import TrainOptions
from impasto.training.run import Run, State, pack_optimizer, unpack_optimizer


class Heard(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, line: str) -> None:
        self.warnings.append(line)


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


def test_another_recipe_is_refused_by_key(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", "dog") as run:
        plain = {"train": {"steps": 5, "learning_rate": 1e-4, "epochs": None}, "method": [{"kind": "lora", "rank": 4}]}
        run.check_recipe(plain, {"train.steps"})
        run.save(state(1), {}, keep=2)
        run.check_recipe({**plain, "train": {**plain["train"], "steps": 9}}, {"train.steps"})
        with pytest.raises(UserError, match="another recipe .*method.0.rank 4 -> 8"):
            run.check_recipe({**plain, "method": [{"kind": "lora", "rank": 8}]}, {"train.steps"})


def test_the_log_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", "dog") as run:
        for step in range(1, 6):
            run.log(step=step)
        with open(run.folder / "log.jsonl", "a") as file:
            file.write('{"step": 6, "lo')  # what a kill leaves
        run.rewind_log(3)
    lines = (tmp_path / "r" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizer_state_comes_back_bit_for_bit(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    options = TrainOptions.model_validate({"optimizer": name, "learning_rate": 1e-2})

    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 96)  # 8-bit states begin at 4096 weights
        return layer, make_optimizer([{"params": list(layer.parameters()), "lr": None}], options, torch.device("cpu"))

    def steps(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, which: range) -> None:
        for i in which:
            optimizer.zero_grad()
            layer(torch.full((2, 64), float(i))).pow(2).sum().backward()
            optimizer.step()

    straight, optimizer = build()
    steps(straight, optimizer, range(6))
    before, optimizer = build()
    steps(before, optimizer, range(3))
    tensors, values = pack_optimizer(optimizer)
    assert any(t.dtype == torch.uint8 for t in tensors.values()) == (name == "adamw8bit")
    after, optimizer = build()
    after.load_state_dict(before.state_dict())
    unpack_optimizer(optimizer, tensors, values)
    steps(after, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), after.parameters(), strict=True))
