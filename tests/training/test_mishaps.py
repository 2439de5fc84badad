"""What may happen to a run from outside: bad files, changed pictures, changed recipes, clocks that jump."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.core.progress import Reporter
from impasto.training import room, trainer
from impasto.training.environment import Precision
from impasto.training.kept_recipe import compare_recipe
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.run import Run
from impasto.training.trainer import train
from tests.heard import Heard
from tests.training.conftest import draw
from tests.training.test_requests import during
from tests.training.test_resume import assert_equal, entries, tensors

RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for key in range(3):
        draw(folder / f"{key}.png", key, (64, 64))
    return folder


# --- pictures ----------------------------------------------------------------------------------------------
def test_three_in_a_hundred_broken_are_all_told_before_anything_is_encoded(recipe: RecipeMaker, tmp_path: Path) -> None:
    folder = tmp_path / "hundred"
    folder.mkdir()
    draw(folder / "000.png", 0, (64, 64))
    for i in range(1, 97):
        shutil.copy(folder / "000.png", folder / f"{i:03d}.png")
    whole = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>not found</html>")
    made = recipe(data={"folder": str(folder), "cache": str(tmp_path / "cache")})
    with pytest.raises(UserError) as raised:
        train(made)
    told = str(raised.value)
    assert "3 files cannot be used" in told and all(name in told for name in ("cut.png", "empty.png", "page.jpg"))
    assert "take them out of the folder" in told and not (tmp_path / "cache").exists()
    for name in ("cut.png", "empty.png", "page.jpg"):
        (folder / name).unlink()
    assert train(made).step == 6


def test_broken_pictures_of_all_parts_are_told_at_once_and_before_the_base_is_loaded(
        recipe: RecipeMaker, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: shutil.copytree(pictures, tmp_path / name) for name in ("one", "two", "class", "apart", "good")}
    for name, folder in folders.items():
        if name != "good":
            (folder / f"{name}.png").write_bytes(b"")
    (folders["one"] / "page.jpg").write_bytes(b"<html>not found</html>")
    plain = recipe().plain()
    plain["data"] = [{**plain["data"], "folder": str(folders[name])} for name in ("one", "good", "two")]
    plain |= {"prior": {"folder": str(folders["class"]), "caption": "a dog"}}
    plain["validation"] |= {"folder": str(folders["apart"])}
    monkeypatch.setattr(trainer, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(UserError) as raised:
        train(Recipe.model_validate(plain))
    first, *lines = str(raised.value).splitlines()
    assert first == "4 sets of pictures cannot be used:"
    assert [line.split(": ")[:2] for line in lines if not line.startswith(" ")] == [
        ["data.0", str(folders["one"])], ["data.2", str(folders["two"] / "two.png")],
        ["validation", str(folders["apart"] / "apart.png")], ["prior", str(folders["class"] / "class.png")]]
    assert [line.split(": ")[0] for line in lines if line.startswith(" ")] == ["  one.png", "  page.jpg"]


def test_a_base_that_is_not_there_is_told_before_pictures_are_looked_at(recipe: RecipeMaker,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "pictures_of", lambda *_: pytest.fail("pictures were looked at"))
    with pytest.raises(UserError, match="nowhere.safetensors"):
        train(recipe(base={"path": "nowhere.safetensors"}))


def test_a_run_that_cannot_begin_leaves_no_folder(recipe: RecipeMaker, pictures: Path, tmp_path: Path) -> None:
    """But one that was there before stays, and what lies in it."""
    (pictures / "cut.png").write_bytes(b"")
    inside, there = tmp_path / "runs/new/dog", tmp_path / "there"
    there.mkdir()
    for folder in (inside, there):
        with pytest.raises(UserError, match="cut.png"):
            train(recipe(data={"folder": str(pictures)}, output={"dir": str(folder), "name": "dog"}))
    assert not (tmp_path / "runs").exists() and there.is_dir()
    (there / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="cut.png"):
        train(recipe(data={"folder": str(pictures)}, output={"dir": str(there), "name": "dog"}))
    assert (there / "mine.txt").read_text() == "mine"


def test_a_picture_that_changes_under_a_run_is_noticed_where_it_is_read_again(recipe: RecipeMaker, pictures: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained VAE reads pictures in each step."""
    plain = recipe(data={"folder": str(pictures)}, train={"steps": 6, "batch_size": 1}).plain()
    plain |= {"method": [{"kind": "full", "parts": ["vae"]}], "objective": {"kind": "reconstruct"}}
    made = Recipe.model_validate(plain)
    with monkeypatch.context() as patch:
        during(2, lambda: [draw(pictures / f"{key}.png", 9, (64, 64)) for key in range(3)] and None, patch)
        with pytest.raises(UserError, match=r"\d.png: has changed since this command started; start it again"):
            train(made)
    with pytest.raises(UserError, match="have changed since this run was stopped.*--accept-changes"):
        train(made)
    heard = Heard()
    assert train(made, heard, accept_changes=True).resumed_from == 2
    assert any("it goes on with them, as told" in line for line in heard.warnings)


def test_a_picture_that_changes_under_a_run_does_not_matter_where_it_is_encoded(
        recipe: RecipeMaker, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(data={"folder": str(pictures)})
    straight = recipe("straight", data={"folder": str(shutil.copytree(pictures, tmp_path / "copies"))})
    train(straight)
    during(2, lambda: draw(pictures / "0.png", 9, (64, 64)), monkeypatch)
    assert train(made).step == 6
    assert_equal(tensors(made.output.dir), tensors(straight.output.dir))


# --- the recipe --------------------------------------------------------------------------------------------
def test_another_recipe_is_refused_by_key_or_gone_on_with_as_told(recipe: RecipeMaker) -> None:
    train(recipe(train={"steps": 3}))
    other: dict[str, Any] = {"train": {"steps": 6, "learning_rate": 5e-4}}
    with pytest.raises(UserError, match=r"another recipe \(train.learning_rate 0.001 -> 0.0005\).*--accept-changes"):
        train(recipe(**other))
    heard = Heard()
    outcome = train(recipe(**other), heard, accept_changes=True)
    assert (outcome.resumed_from, outcome.step) == (3, 6)
    assert "goes on with train.steps 3 -> 6" in heard.notes
    assert any("train.learning_rate 0.001 -> 0.0005" in line for line in heard.warnings)
    log = entries(recipe().output.dir)
    changes = [entry["changes"] for entry in log if entry.get("event") == "recipe changed"]
    assert changes == [["train.learning_rate 0.001 -> 0.0005"]]
    assert [e["learning_rate"] for e in log if "loss" in e] == [1e-3] * 3 + [5e-4] * 3
    heard = Heard()
    train(recipe(train={"steps": 7, "learning_rate": 5e-4}), heard)  # it is now the recipe of this run
    assert heard.warnings == []


LORA = {"kind": "lora", "rank": 4}


@pytest.mark.parametrize(("before", "after", "says"), [
    ({}, {"method": [{"kind": "lora", "rank": 8}]}, r"method\.0.*: the checkpoint .* holds other weights"),
    ({}, {"method": [LORA | {"targets": ["convolutions"]}]}, r"method\.0.*: the checkpoint .* holds other weights"),
    ({}, {"method": [{"kind": "full"}]}, r"method\.0.*: the checkpoint .* holds other weights"),
    ({"method": [LORA, LORA | {"targets": ["text-encoder"]}]}, {}, r"method\.1: the checkpoint .* other weights"),
    ({}, {"train": {"optimizer": "sgd"}}, "train.optimizer: the checkpoint .* holds the state of another"),
    ({"train": {"optimizer": "sgd"}}, {}, "train.optimizer: the checkpoint .* holds the state of another"),
    ({}, {"train": {"optimizer": "muon"}},
     "train.optimizer: the checkpoint .* holds the state of another"),
    ({}, {"train": {"rates": {"attn1": 1e-4}}}, "in other groups"),
    ({}, {"train": {"ema": 0.9}}, "train.ema: the checkpoint of step 2 holds no averages"),
])
def test_what_does_not_fit_another_recipe_is_one_line_and_leaves_the_kept_one(
        before: dict[str, Any], after: dict[str, Any], says: str, recipe: RecipeMaker) -> None:
    def made(sections: dict[str, Any]) -> Recipe:
        plain = recipe(train={"steps": 2, **sections.get("train", {})}).plain()
        return make_recipe({**plain, "method": sections.get("method", plain["method"])})

    train(made(before))
    folder = Path(recipe().output.dir)
    kept = {path: path.read_bytes() for path in (folder / "recipe.toml", folder / "log.jsonl")}
    with pytest.raises(UserError, match=says) as raised:
        train(made(after), accept_changes=True)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_a_loss_scale_begins_anew_where_the_precision_had_none(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
                                                               ) -> None:
    train(recipe(train={"steps": 2}))
    monkeypatch.setattr(Precision, "scaler", lambda _: torch.amp.GradScaler("cpu"))
    outcome = train(recipe(train={"steps": 4}))
    assert (outcome.resumed_from, outcome.step) == (2, 4)
    assert train(recipe(train={"steps": 5})).resumed_from == 4  # and is then kept


def test_a_kept_recipe_that_cannot_be_read_is_said(recipe: RecipeMaker) -> None:
    made = recipe(train={"steps": 2})
    train(made)
    (Path(made.output.dir) / "recipe.toml").write_text("[base\n", encoding="utf-8")
    with Run.open(Path(made.output.dir), "dog") as run, pytest.raises(UserError, match="recipe.toml: cannot be read"):
        compare_recipe(run, made.plain())


# --- the directory -----------------------------------------------------------------------------------------
def test_a_changed_value_in_a_manifest_is_damage(recipe: RecipeMaker) -> None:
    made = recipe(train={"steps": 4})
    train(made)
    manifest = Path(made.output.dir) / "checkpoints" / "000004" / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    assert '"total": 4' in text
    manifest.write_text(text.replace('"total": 4', '"total": 5'), encoding="utf-8")
    heard = Heard()
    assert train(made, heard).resumed_from == 2
    assert any("000004 is damaged and is passed over" in line for line in heard.warnings)
    assert train(made).resumed_from == 4


def test_an_older_manifest_has_no_seal(recipe: RecipeMaker) -> None:
    made = recipe(train={"steps": 2})
    train(made)
    manifest = Path(made.output.dir) / "checkpoints" / "000002" / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8"))
    del told["seal"]
    manifest.write_text(json.dumps(told), encoding="utf-8")
    assert train(made).resumed_from == 2


def test_room_is_asked_for_before_the_first_step(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(room, "SPARE", 2**60)
        during(0, lambda: pytest.fail("a step was taken"), patch)
        with pytest.raises(UserError, match=r"what this run leaves takes \d+ MiB, and \d+ MiB are free"):
            train(recipe())
    sizes: list[tuple[int, int]] = []
    plain = trainer.ask_for_room

    def note(run: Run, output: Any, checkpoint: int, artifact: int, report: Reporter) -> None:
        sizes.append((checkpoint, artifact))
        plain(run, output, checkpoint, artifact, report)

    monkeypatch.setattr(trainer, "ask_for_room", note)
    train(recipe())
    folder = Path(recipe().output.dir)
    state = load_file(folder / "checkpoints" / "000006" / "state.safetensors")
    assert sum(t.numel() * t.element_size() for t in state.values()) == pytest.approx(sizes[0][0], rel=0.01)
    assert (folder / "dog.safetensors").stat().st_size >= sizes[0][1] > 0


def test_checkpoints_that_are_kept_and_have_no_room_are_a_warning(recipe: RecipeMaker, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    heard = Heard()
    run = Run(tmp_path, "dog")
    room.ask_for_room(run, recipe(output={"keep": 2}).output, 2**28, 2**20, heard)
    assert heard.warnings == []
    room.ask_for_room(run, recipe(output={"keep": 9}).output, 2**28, 2**20, heard)
    assert len(heard.warnings) == 1 and "the 9 checkpoints that are kept" in heard.warnings[0]


# --- clocks ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("jumps", [[-1e7], [1e9], [1e9, -1e9]], ids=["back", "forwards", "to and fro"])
def test_a_clock_that_jumps_changes_nothing(recipe: RecipeMaker, jumps: list[float], monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    straight, made = recipe("straight"), recipe("jumping")
    train(straight)
    plain, offsets = time.time, iter(jumps * 10_000)
    monkeypatch.setattr(time, "time", lambda: plain() + next(offsets))
    assert train(made, stop_after=3).step == 3
    assert train(made).resumed_from == 3
    assert_equal(tensors(straight.output.dir), tensors(made.output.dir))
    told = [entry for entry in entries(made.output.dir) if "loss" in entry]
    assert [entry["step"] for entry in told] == [1, 2, 3, 4, 5, 6] and all(0 < e["seconds"] < 100 for e in told)


def test_a_clock_that_stands_still_divides_nothing_by_nought(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
                                                             ) -> None:
    """Some systems' clocks tick sixty times a second, and small bases are quicker."""
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 5.0)
    made = recipe(train={"steps": 2})
    assert train(made).step == 2
    assert [entry["step"] for entry in entries(made.output.dir) if "loss" in entry] == [1, 2]




def test_the_holder_of_a_directory_is_named_whatever_the_age_of_its_lock(recipe: RecipeMaker,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe()
    with Run.open(Path(made.output.dir), "dog"):
        plain = time.time
        monkeypatch.setattr(time, "time", lambda: plain() + 1e9)
        with pytest.raises(UserError, match=r"process \d+ on \S+ is already training here.*another output.dir"):
            train(made)
