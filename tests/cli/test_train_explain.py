from __future__ import annotations

import json
from pathlib import Path

import pytest

from impasto.cli import app
from impasto.cli.explanation import shown
from impasto.training.recipe import READY
from tests.cli.running import impasto, one_line


def run(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        app.main(["train", *map(str, arguments), "--explain"])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text('[base]\npath = "x.safetensors"\n[method]\nkind = "lora"\nrank = 8\n[sample]\n'
                                     f'prompts = ["{"a long prompt, " * 20}"]\nnegative = "\\u001b[31mred"\n')
    return tmp_path / "r.toml"


@pytest.mark.parametrize("width", [60, 100, 250])
def test_the_text_has_value_origin_and_reason_and_fits(width: int, recipe: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = run(capsys, recipe, "train.steps=9")
    lines = text.splitlines()[1:]  # the first one is the recipe's path
    assert max(map(len, lines)) <= min(width, 100) and "\x1b" not in text
    assert any(line.split() == ["rank", "recipe", "8"] for line in lines)
    assert any(line.split() == ["steps", "command", "line", "9"] for line in lines)
    assert any(line.split() == ["learning_rate", "default", "0.0001"] for line in lines)
    assert "[train] the loop." in text and "[data] the pictures to learn from." in text
    assert "not in this recipe" in text
    assert "OneTrainer" in text  # reasons are there


def test_the_json_has_all_of_it(recipe: Path, capsys) -> None:
    told = json.loads(run(capsys, recipe, "train.steps=9", "--json"))
    assert told["recipe"] == str(recipe)
    settings = {(each["section"], each["key"]): each for each in told["settings"]}
    assert settings["train", "steps"]["from"] == "command line" and settings["train", "steps"]["value"] == 9
    assert settings["method", "rank"]["from"] == "recipe" and settings["method", "rank"]["why"].startswith("Size")
    assert settings["train", "betas"]["value"] == [0.9, 0.999]


def test_nothing_is_trained_and_bad_recipes_are_one_line(recipe: Path, tmp_path: Path) -> None:
    done = impasto("train", recipe, "--explain", cwd=tmp_path)
    assert done.returncode == 0 and not (tmp_path / "runs").exists() and not done.stderr
    assert "did you mean 'rank'" in one_line(impasto("train", recipe, "method.rnak=8", "--explain"))


def test_values_look_as_in_a_recipe() -> None:
    assert [shown(value) for value in (None, True, "a", [1, "b"], {"k": 0.5}, 1e-8)] == [
        "-", "true", '"a"', '[1, "b"]', "{k = 0.5}", "1e-08"]


def test_its_help_names_every_ready_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["train", "--help"])
    told = capsys.readouterr().out
    for path in READY.rglob("*.toml"):
        assert path.stem.startswith("pretrain") or path.stem in told
