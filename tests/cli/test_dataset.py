"""`impasto dataset check`: the verdict, the exit code, one document, lines that fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from impasto.cli import app
from impasto.data.dataset import list_folder
from tests.cli.running import impasto, one_line
from tests.data.photos import encoded, good_folder, photo, put

SMALL = ("data.resolution=192", "data.bucket_step=32")


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and what is printed, run in this process."""
    with pytest.raises(SystemExit) as ended:
        app.main(["dataset", "check", *map(str, arguments)])
    return int(ended.value.code or 0), capsys.readouterr().out


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return good_folder(tmp_path / "photos", 4, (192, 192))


@pytest.fixture
def bad(good: Path) -> Path:
    put(good / "torn.jpg", encoded(photo(7), "JPEG")[:500], "torn")
    put(good / "no words.png", photo(8))
    code = "" if os.name == "nt" else "\x1b[31m"
    for i in range(12):
        put(good / f"copy {i} {code} of a picture with a name that goes on and on and on.jpg",
            (good / "000.jpg").read_bytes(), "one caption for all of them, so long that it fills a line and more")
    return good


def test_a_good_folder(good: Path, capsys) -> None:
    code, shown = check(capsys, good, *SMALL)
    assert code == 0
    assert shown.startswith("fit to train: 4 pictures, and nothing to warn of\n")
    assert "4 of 4 can be used" in shown and "192x192" in shown and "refused" not in shown and "warnings" not in shown


def test_a_bad_folder_names_everything_that_a_run_refuses(bad: Path, capsys) -> None:
    code, shown = check(capsys, bad, *SMALL)
    assert code == 1
    assert shown.startswith("not fit to train yet: a run would refuse 2 pictures\n")
    assert "torn.jpg" in shown and "is damaged" in shown and "has no caption (no words.txt)" in shown
    assert "12 exact copies" in shown and "and 6 more" in shown and "--json lists all" in shown


def test_lines_fit_and_no_file_commands_the_terminal(bad: Path) -> None:
    for encoding, width in (("utf-8", "80"), ("ascii", "60")):
        shown = impasto("dataset", "check", bad.name, *SMALL, cwd=bad.parent, PYTHONIOENCODING=encoding, COLUMNS=width)
        assert shown.returncode == 1 and "\x1b" not in shown.stdout
        assert max(map(len, shown.stdout.splitlines())) <= int(width)
    assert "####" in shown.stdout  # bars where the code page has no blocks


def test_json_is_one_complete_document(bad: Path, capsys) -> None:
    code, shown = check(capsys, bad, *SMALL, "--json")
    told = json.loads(shown)
    assert code == 1 and shown.isascii() and told["fit"] is False and told["page"] is None
    (folder,) = told["folders"]
    assert list(folder["files"]) == list_folder(bad).pictures
    assert {name for name, file in folder["files"].items() if not file["used"]} == {"torn.jpg", "no words.png"}
    assert [(f["level"], f["kind"], len(f["names"])) for f in folder["findings"]] == [
        ("refused", "unreadable", 1), ("refused", "no caption", 1), ("warning", "copies", 12),
        ("note", "shared captions", 12)]
    assert folder["alike"][0]["exact"] and len(folder["alike"][0]["names"]) == 13


def test_near_duplicates_are_left_out_on_request(good: Path, capsys) -> None:
    put(good / "again.jpg", encoded(photo(0, (192, 192)), "JPEG", quality=50), "again")
    kinds = [[f["kind"] for f in json.loads(check(capsys, good, *SMALL, "--json", *more)[1])["folders"][0]["findings"]]
             for more in ((), ("--no-near-duplicates",))]
    assert kinds == [["near-duplicates"], []]


def test_a_recipe_s_folders_and_options_are_looked_at(good: Path, tmp_path: Path, capsys) -> None:
    put(tmp_path / "class" / "a.png", Image.new("RGB", (20, 20)))
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"""[base]
path = "not there"
[data]
folder = {json.dumps(str(good))}
resolution = 192
bucket_step = 32
[prior]
folder = {json.dumps(str(tmp_path / "class"))}
caption = "a dog"
[method]
kind = "none that is known"
[train]
batch_size = 5
""")
    code, shown = check(capsys, recipe, "--json")
    told = json.loads(shown)
    assert code == 1 and [f["title"] for f in told["folders"]] == ["pictures", "class pictures"]
    assert [f["fit"] for f in told["folders"]] == [True, False] and told["folders"][0]["batch_size"] == 5
    assert [f["kind"] for f in told["folders"][0]["findings"]] == ["thin buckets"]
    code, shown = check(capsys, recipe, "train.batch_size=1", "data.resolution=64", "data.bucket_step=8")
    assert code == 0 and "class pictures:" in shown


def test_a_ready_recipe_with_a_folder(good: Path, capsys) -> None:
    code, shown = check(capsys, "lora", f"data.folder={good}", "data.resolution=192", "data.bucket_step=32")
    assert code == 0 and "4 of 4" in shown


def test_the_drawn_world_needs_no_look(capsys) -> None:
    code, shown = check(capsys, "mini/pretrain_vae", "--json")
    assert code == 0 and json.loads(shown)["fit"] and "drawn world" in json.loads(shown)["verdict"]


@pytest.mark.parametrize(("arguments", "says"), [
    (["nowhere"], "no such folder"),
    (["lora"], "data.folder"),
    ([".", "dta.caption=x"], "did you mean 'data'"),
    ([".", "data.captoin=x"], "did you mean 'caption'"),
    ([".", "train.batch_size=0"], "train.batch_size"),
    (["."], "no pictures"),
])
def test_what_cannot_be_looked_at_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in one_line(impasto("dataset", "check", *arguments, cwd=tmp_path))


def test_the_page_is_written_and_not_over_another(bad: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "out" / "page.html"
    code, shown = check(capsys, bad, *SMALL, "--html", page)
    assert code == 1 and f"page: {page}" in shown and page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    page.write_text("mine")
    with pytest.raises(SystemExit):
        app.main(["dataset", "check", str(bad), *SMALL, "--html", str(page)])
    assert "--force" in capsys.readouterr().err and page.read_text() == "mine"
    check(capsys, bad, *SMALL, "--html", page, "--force")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_wrong_verb_is_told_with_the_nearest(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["dataset", "chek"])
    assert ended.value.code == 2 and "did you mean 'check'?" in capsys.readouterr().err


def test_several_sets(good: Path, tmp_path: Path, capsys) -> None:
    """Each folder is looked at; the drawn world has none."""
    recipe = tmp_path / "r.toml"
    small = "resolution = 192\nbucket_step = 32"
    recipe.write_text(f"[[data]]\nfolder = '{good}'\n{small}\n[[data]]\nsource = 'world'\n{small}\n"
                      f"[[data]]\nfolder = '{good}'\n{small}\nrepeats = 2\n", encoding="utf-8")
    code, shown = check(capsys, recipe)
    assert code == 0 and shown.startswith("fit to train: 8 pictures in 2 sets")
    assert f"pictures of data.0: {good}" in shown and f"pictures of data.2: {good}" in shown
    told = json.loads(check(capsys, recipe, "--json")[1])
    assert [folder["data"]["repeats"] for folder in told["folders"]] == [1, 2]
