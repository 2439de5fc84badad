"""`impasto plan` as users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.checkpoints import write_checkpoint
from tests.cli.running import impasto, one_line


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    base = write_checkpoint(folder / "mini.safetensors")
    (folder / "recipe.toml").write_text(f'[base]\npath = "{base.as_posix()}"\n[method]\nkind = "lora"\n')
    return folder / "recipe.toml"


def test_squares_and_a_verdict(recipe: Path, tmp_path: Path) -> None:
    result = impasto("plan", recipe, "--card", "8GiB", "--picture", tmp_path / "plan.png")
    assert result.returncode == 0, result.stderr
    assert "UNet" in result.stdout and "at its peak" in result.stdout
    assert "fits on 8 GiB, with " in result.stdout
    assert "pictures of 64x64 pixels" in result.stderr
    with Image.open(tmp_path / "plan.png") as drawn:
        assert drawn.width > 200


def test_what_makes_it_fit(recipe: Path, tmp_path: Path) -> None:
    """Fewer pictures at once do, here; the recipe that is written is one that fits."""
    given = [recipe, "train.device=cpu", "data.resolution=256", "train.batch_size=16"]
    peak = json.loads(impasto("plan", *given, "--json").stdout)["peak_bytes"]
    result = impasto("plan", *given, "--card", f"{0.8 * peak / 2**20:.0f}MiB", "--json",
                     "--apply", tmp_path / "new.toml")
    told = json.loads(result.stdout)
    assert told["fits"] is False and told["fits_changed"] is True and told["changes"]
    assert told["peak_bytes"] == sum(told["parts"].values()) == peak and told["artifact_bytes"] > 0
    assert "context" not in told["parts"] and told["changed_peak_bytes"] <= 0.8 * peak + 2**20
    again = json.loads(impasto("plan", tmp_path / "new.toml", "--json").stdout)
    assert again["peak_bytes"] == told["changed_peak_bytes"]


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    assert "'base' is missing" in one_line(impasto("plan", "lora"))
    assert "nowhere" in one_line(impasto("plan", "lora", "base.path=nowhere"))
    assert "big" in one_line(impasto("plan", "lora", "base.family=sd1", "--card", "big"))


def test_training_asks_for_what_planning_does_not_need(tmp_path: Path) -> None:
    made = f"output.dir={tmp_path / 'run'}"
    assert "'base.path' is missing" in one_line(impasto("train", "lora", "base.family=sd1", "data.folder=x", made))
    assert "data.folder=" in one_line(impasto("train", "lora", "base.path=x.safetensors", made))
    assert not (tmp_path / "run").exists()
