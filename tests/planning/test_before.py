"""What a train verb does with a forecast: nothing where it fits, a line where it does not, or the cheapest change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch

from impasto.cli import app
from impasto.core.errors import UserError
from impasto.planning import before, drift, memory
from impasto.planning.forecast import Forecast
from impasto.planning.time import Speed
from impasto.training.counted import bytes_of, tensors_on
from impasto.training.kept_recipe import FILE, without_none
from impasto.training.optimizers import OPTIMIZERS
from impasto.training.recipe import make_recipe
from tests.checkpoints import write_checkpoint
from tests.heard import Heard
from tests.training.conftest import draw, tree

GIB = 2**30


def forecast(recipe, device: str = "cpu") -> Forecast:
    """8 GiB of activations for each picture, a quarter of it with checkpointing."""
    share = 4 if recipe.train.checkpointing else 1
    return Forecast({"unet": GIB, "activations": 8 * GIB * recipe.train.batch_size // share}, "backward", 0)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    (tmp_path / "photos").mkdir()
    for key in range(3):
        draw(tmp_path / "photos" / f"{key}.png", key, (64, 64))
    base = write_checkpoint(tmp_path / "mini.safetensors")
    monkeypatch.setattr(before, "forecast", forecast)
    return tree(base, tmp_path / "photos", tmp_path / "run", train={"steps": 2, "fit": True})


def test_what_fits_stays(told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "free", lambda device: 18 * GIB)
    recipe, heard = make_recipe(told), Heard()
    monkeypatch.setattr(before, "speed_here", lambda *_: None)
    assert before.look_ahead(recipe, heard)[0] == recipe
    assert heard.notes == ["needs about 17.0 of 18.0 GiB that are free"]


def test_what_it_takes_is_told_where_the_speed_is_known(told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "free", lambda device: 18 * GIB)
    monkeypatch.setattr(before, "forecast", lambda *_: replace(forecast(*_), flops={"forward": 3e9}, traffic=2e9))
    monkeypatch.setattr(before, "speed_here", lambda *_: Speed("here", "fp32", 1e9, 1e9, measured=True))
    heard = Heard()
    before.look_ahead(make_recipe(told), heard)
    assert heard.notes == ["needs about 17.0 of 18.0 GiB that are free; about 5 s a step, 10 s for 2 steps "
                           "(measured here)"]


def test_what_does_not_fit_is_changed_and_goes_on_so(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "free", lambda device: 6 * GIB)
    heard = Heard()
    recipe, found = before.look_ahead(make_recipe(told), heard)
    assert recipe.train.checkpointing and found is not None and found.peak_bytes == 5 * GIB
    assert any("train.checkpointing=true (about a third more time" in line for line in heard.notes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text(tomli_w.dumps(without_none(recipe.plain())))
    monkeypatch.setattr(before, "free", lambda device: 100 * GIB)  # later there is room, and it stays what it was
    assert before.look_ahead(make_recipe(told), Heard())[0].train.checkpointing


def test_what_is_not_installed_is_no_means(told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight-bit states would do, if their library were here: what comes after them is taken."""
    def states(recipe, device: str = "cpu") -> Forecast:
        small = recipe.train.optimizer == "adamw8bit" or recipe.train.offload == ["optimizer"]
        return Forecast({"unet": GIB, "optimizer": GIB if small else 4 * GIB}, "backward", 0)

    monkeypatch.setattr(before, "forecast", states)
    monkeypatch.setattr(before, "free", lambda device: 3 * GIB)
    monkeypatch.setitem(OPTIMIZERS, "adamw8bit", replace(OPTIMIZERS["adamw8bit"], path="not_installed:AdamW8bit"))
    recipe, _ = before.look_ahead(make_recipe(told), Heard())
    assert recipe.train.optimizer == "adamw" and recipe.train.offload == ["optimizer"]


def test_in_no_way(told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "free", lambda device: GIB // 2)
    with pytest.raises(UserError, match=r"needs about 17.0 GiB, and 0.5 are free, and no change brings it below"):
        before.look_ahead(make_recipe(told), Heard())


def test_without_being_asked_a_cpu_looks_at_nothing(told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "forecast", lambda *_: pytest.fail("nobody asked"))
    told["train"]["fit"] = False
    assert before.look_ahead(make_recipe(told), Heard())[1] is None


def test_what_a_run_took_is_kept_beside_its_forecast(told, own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    """On a CPU its first steps are counted."""
    monkeypatch.setattr(before, "forecast", memory.forecast)
    (tmp_path / "my.toml").write_text(tomli_w.dumps(told))
    others = tensors_on(torch.device("cpu"))  # other tests', which are not to go meanwhile
    with pytest.raises(SystemExit) as ended:
        app.main(["train", str(tmp_path / "my.toml")])
    assert not ended.value.code
    (entry,) = drift._entries()
    assert entry["measured"] - bytes_of(others) == pytest.approx(entry["forecast"], rel=0.01)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line.get("event") == "memory")["allocated"] == entry["measured"]


def test_the_verb(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forecast is in the run's log, and the changed recipe is the one that it keeps."""
    monkeypatch.setattr(before, "free", lambda device: 6 * GIB)
    (tmp_path / "my.toml").write_text(tomli_w.dumps(told))
    with pytest.raises(SystemExit) as ended:
        app.main(["train", str(tmp_path / "my.toml")])
    assert not ended.value.code
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line.get("event") == "forecast")["peak_bytes"] == 5 * GIB
    assert "checkpointing = true" in (tmp_path / "run" / FILE).read_text()
