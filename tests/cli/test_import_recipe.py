from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from impasto.cli import app
from tests.cli.running import impasto, one_line

COMMAND = ("accelerate launch train_network.py --pretrained_model_name_or_path=a.ckpt --train_data_dir=dogs "
           "--network_dim=8 --color_aug --sparkle=1 --xformers --v2=False --wandb_api_key=hunter2 --max_tr=5 "
           "--output_name=" + "x" * 150)


@pytest.fixture
def command(tmp_path: Path) -> Path:
    (tmp_path / "run.sh").write_text(COMMAND)
    return tmp_path / "run.sh"


def run(capsys, *arguments: object) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        app.main(["import-recipe", *map(str, arguments)])
    assert not ended.value.code
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_the_recipe_is_printed_and_the_account_beside_it(command: Path, capsys) -> None:
    recipe, account = run(capsys, command)
    assert tomllib.loads(recipe)["method"]["rank"] == 8
    for told in ("network_dim = 8  ->  method.rank = 8", "not carried over (4)", "color_aug", "sparkle = 1",
                 "is no key that we know", "not needed (1)", "xformers", "without effect (1): v2", "method.alpha = 1.0",
                 "note"):
        assert told in account, told
    assert "hunter2" not in recipe + account


def test_the_recipe_is_written_and_trains_as_written(command: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "recipe.toml"
    account, _ = run(capsys, command, "-o", out)
    assert "not carried over" in account and str(out) in account
    with pytest.raises(SystemExit) as ended:
        app.main(["train", str(out), "--explain", "--json"])
    assert not ended.value.code
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert {"section": "method", "key": "rank", "value": 8, "from": "recipe"}.items() <= \
        next(each for each in settings if each["key"] == "rank").items()
    assert [path.name for path in out.parent.iterdir()] == ["recipe.toml"]


def test_what_exists_is_refused_without_force(command: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "recipe.toml").write_text("mine")
    assert "is there already" in one_line(impasto("import-recipe", command, "-o", tmp_path / "recipe.toml"))
    assert (tmp_path / "recipe.toml").read_text() == "mine"
    run(capsys, command, "-o", tmp_path / "recipe.toml", "--force")
    assert (tmp_path / "recipe.toml").read_text() != "mine"


def test_the_json_has_all_of_it(command: Path, tmp_path: Path, capsys) -> None:
    told = json.loads(run(capsys, command, "--json", "-o", tmp_path / "recipe.toml")[0])
    assert told["file"] == str(tmp_path / "recipe.toml")
    assert tomllib.loads(told["toml"]) == told["tree"] == tomllib.loads((tmp_path / "recipe.toml").read_text())
    assert told["trainer"] == "kohya's sd-scripts" and told["files"] == [str(command)]
    assert [left["key"] for left in told["unknown"]] == ["sparkle", "max_tr"]
    assert {"key": "network_dim", "value": "8", "to": "method.rank", "becomes": 8, "why": ""} in told["carried"]
    lost = {each["key"]: each for each in told["lost"]}
    assert (lost["color_aug"]["value"], lost["color_aug"]["here"]) == (True, "data.hue")
    assert lost["color_aug"]["why"] == "its changes of hue and gamma are other ones"


@pytest.mark.parametrize("width", [60, 100])
def test_the_account_fits(width: int, command: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert max(map(len, run(capsys, command)[1].splitlines())) <= max(width, len(str(command)) + 24)


def test_no_torch_is_loaded_and_a_foreign_words_command_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('pretrained_model_name_or_path = "a"\nnetwork_dim = 4\n'
                                     '"new\\u001b[31m" = "\\u001b"\n')
    done = impasto("import-recipe", tmp_path / "a.toml", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert not any(line.rpartition("|")[2].strip() in ("torch", "numpy") for line in done.stderr.splitlines())


@pytest.mark.parametrize(("content", "told"), [
    ("hello", "is none of what can be read"), ("", "is none of what can be read"),
    ("train_network.py --a 'b", "a quote is not closed")])
def test_bad_files_are_one_line(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    line = one_line(impasto("import-recipe", tmp_path / "a.txt"))
    assert told in line and str(tmp_path / "a.txt") in line


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(command: Path) -> None:
    command.chmod(0)
    assert "cannot be read" in one_line(impasto("import-recipe", command))
