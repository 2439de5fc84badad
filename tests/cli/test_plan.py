"""`impasto plan` as users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from impasto.cli.plan import card_of
from impasto.core.errors import UserError
from tests.checkpoints import write_checkpoint
from tests.cli.running import impasto, one_line


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    base = write_checkpoint(folder / "mini.safetensors")
    (folder / "recipe.toml").write_text(f'[base]\npath = "{base.as_posix()}"\n[method]\nkind = "lora"\n')
    return folder / "recipe.toml"


@pytest.mark.parametrize(("text", "count"), [
    ("16GiB", 16 * 2**30), ("24GB", 24 * 10**9), ("12", 12 * 2**30), ("7.5 gib", int(7.5 * 2**30)), ("512MiB", 2**29)])
def test_sizes_of_cards(text: str, count: int) -> None:
    assert card_of(text).bytes == count


@pytest.mark.parametrize("text", ["", "GiB", "16 bananas", "-1", "0", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        card_of(text)


def test_a_table_and_a_verdict(recipe: Path) -> None:
    result = impasto("plan", recipe, "--card", "8GiB")
    assert result.returncode == 0, result.stderr
    assert "UNet" in result.stdout and "at its peak" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("fits on 8GiB, with ")
    assert "pictures of 64x64 pixels" in result.stderr


def test_for_machines_and_a_card_too_small(recipe: Path) -> None:
    result = impasto("plan", recipe, "train.device=cpu", "data.resolution=128", "--card", "1MiB", "--json")
    told = json.loads(result.stdout)
    assert told["peak_bytes"] == sum(told["parts"].values()) and told["fits"] is False
    assert told["seconds_per_step"] is None and told["changes"] == [] and told["artifact_bytes"] > 0
    assert "context" not in told["parts"]
    assert "the weights alone are" in impasto("plan", recipe, "--card", "1MiB").stdout


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    assert "'base' is missing" in one_line(impasto("plan", "lora"))
    assert "nowhere" in one_line(impasto("plan", "lora", "base.path=nowhere"))
    assert "is no size" in one_line(impasto("plan", "lora", "base.family=sd1", "--card", "big"))


def test_training_asks_for_what_planning_does_not_need(tmp_path: Path) -> None:
    made = f"output.dir={tmp_path / 'run'}"
    assert "'base.path' is missing" in one_line(impasto("train", "lora", "base.family=sd1", "data.folder=x", made))
    assert "data.folder=" in one_line(impasto("train", "lora", "base.path=x.safetensors", made))
    assert not (tmp_path / "run").exists()
