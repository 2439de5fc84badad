"""Trackers are told each step once, and nothing that they do reaches the training."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import threading
import time
import types
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.training.proof import verify_resume
from impasto.training.recipe import Recipe
from impasto.training.reproduce import read_told
from impasto.training.trackers import TRACKERS, tracking
from impasto.training.trackers.base import Sitting, Tracker
from impasto.training.trainer import Trainer, train
from tests.heard import Heard
from tests.training.standing_in import SETTINGS, StandIn

RecipeMaker = Callable[..., Recipe]


class Book(Tracker):
    """Writes down what it is told; `trouble`, by the name of a call, happens in its place."""

    sittings: list[Sitting] = []
    told: list[tuple[str, Any]] = []
    trouble: dict[str, Callable[[], None]] = {}

    def _do(self, call: str, told: Any) -> None:
        if call in self.trouble:
            self.trouble[call]()
        self.told.append((call, told))

    @classmethod
    def check(cls) -> None:
        pass

    def begin(self, sitting: Sitting) -> str:
        self._do("begin", sitting.id)
        self.sittings.append(sitting)
        return "look here"

    def figures(self, step, figures) -> None:
        self._do("figures", step)
        assert {"loss", "mean_loss", "learning_rate", "gradient_norm", "memory"} <= figures.keys()

    def pictures(self, step, pictures) -> None:
        self._do("pictures", (step, [(prompt, file.name) for prompt, file in pictures]))
        assert all(file.exists() for _, file in pictures)

    def end(self, ending) -> None:
        self._do("end", ending)

    @classmethod
    def of(cls, call: str) -> list[Any]:
        return [told for what, told in cls.told if what == call]


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> type[Book]:
    monkeypatch.setitem(TRACKERS.entries, "book", f"{__name__}:Book")
    monkeypatch.setattr(Book, "sittings", [])
    monkeypatch.setattr(Book, "told", [])
    monkeypatch.setattr(Book, "trouble", {})
    return Book


def fail(what: BaseException) -> Callable[[], None]:
    def trouble() -> None:
        raise what
    return trouble


def test_a_run_is_told_from_its_recipe_to_its_end(recipe: RecipeMaker, book: type[Book], tmp_path: Path) -> None:
    heard = Heard()
    made = recipe(output={"trackers": ["book"], "track_every": 2}, train={"steps": 4},
                  sample={"every": 4, "steps": 1, "prompts": ["a dog"]})
    train(made, heard)
    assert book.told == [("begin", book.sittings[0].id), ("pictures", (0, [("a dog", "000000-0.png")])),
                         ("figures", 2), ("figures", 4), ("pictures", (4, [("a dog", "000004-0.png")])),
                         ("end", "finished")]
    sitting = book.sittings[0]
    assert sitting.name == "dog" and not sitting.resumed and sitting.recipe["train"]["steps"] == 4
    assert str(tmp_path) not in json.dumps(sitting.recipe)
    assert "book: look here" in heard.notes and heard.warnings == []
    train(made, heard)  # nothing is left to do, and nothing to tell
    assert len(book.sittings) == 1


@pytest.mark.parametrize("how", ["asked to stop", "killed after the checkpoint"])
def test_a_resumed_run_is_told_on_and_no_step_twice(how: str, recipe: RecipeMaker, book: type[Book],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(output={"trackers": ["book"]}, sample={"every": 3, "steps": 1})
    if how == "asked to stop":
        assert train(made, stop_after=3).artifact is None
    else:
        kept = Trainer._keep

        def killed(self: Trainer, step: int, *rest: Any, **more: Any) -> None:
            kept(self, step, *rest, **more)
            if step == 5:  # the last checkpoint is of step 4
                raise KeyboardInterrupt
        monkeypatch.setattr(Trainer, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            train(made)
        monkeypatch.setattr(Trainer, "_keep", kept)
    assert train(made).resumed_from == (3 if how == "asked to stop" else 4)
    assert book.of("figures") == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in book.of("pictures")] == [0, 3, 6]
    assert book.of("end") == ["stopped" if how == "asked to stop" else "failed", "finished"]
    first, second = book.sittings
    assert first.id == second.id and (first.resumed, second.resumed) == (False, True)


def test_a_run_that_begins_anew_is_another_one(recipe: RecipeMaker, book: type[Book],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(output={"trackers": ["book"]}, train={"steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_keep", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(made)  # before its first checkpoint
    train(made)
    assert book.of("figures")[-3:] == [1, 2, 3] and book.sittings[0].id != book.sittings[1].id


def sitting_of(recipe: Recipe, heard: Heard, first: int = 0, steps: int = 4) -> None:
    """What the loop tells of a few steps, without the loop."""
    folder = Path(recipe.output.dir)
    (folder / "previews").mkdir(parents=True, exist_ok=True)
    (folder / "previews" / "p.png").touch()
    told = tracking.Tracking(recipe, folder, "dog", heard)
    told.begin(first)
    for step in range(first + 1, first + steps + 1):
        told.figures(step, dict.fromkeys(("loss", "mean_loss", "learning_rate", "gradient_norm", "memory"), 1.0))
        told.pictures(step, ["a dog"], [folder / "previews" / "p.png"])
    told.end("finished")


@pytest.mark.parametrize("call", ["begin", "figures", "pictures", "end"])
@pytest.mark.parametrize("error", [ConnectionError("no\nroute to host"), OSError(28, "No space left"), SystemExit(1)])
def test_a_tracker_that_fails_is_one_warning(call: str, error: BaseException, recipe: RecipeMaker, book: type[Book]
                                             ) -> None:
    heard = Heard()
    book.trouble[call] = fail(error)
    sitting_of(recipe(output={"trackers": ["book"]}), heard)
    assert len(heard.warnings) == 1 and heard.warnings[0].startswith("book: ") and "\n" not in heard.warnings[0]
    assert heard.warnings[0].endswith("the training goes on without it")
    assert book.of("figures") == ([] if call in ("begin", "figures") else [1] if call == "pictures" else [1, 2, 3, 4])


@pytest.mark.parametrize("call", ["begin", "figures", "end"])
def test_a_tracker_that_hangs_does_not_hold_the_run(call: str, recipe: RecipeMaker, book: type[Book],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    heard, free = Heard(), threading.Event()
    monkeypatch.setattr(tracking, "PATIENCE", 0.3)
    monkeypatch.setattr(tracking, "WAITING", 2)
    book.trouble[call] = lambda: free.wait(60) and None
    started = time.monotonic()
    sitting_of(recipe(output={"trackers": ["book"]}), heard, steps=100)
    assert time.monotonic() - started < 10
    free.set()
    assert len(heard.warnings) == 1 and "left behind" in heard.warnings[0]


def test_a_memory_that_is_damaged_or_cannot_be_kept(recipe: RecipeMaker, book: type[Book]) -> None:
    heard, made = Heard(), recipe(output={"trackers": ["book"]})
    sitting_of(made, heard)
    memory = Path(made.output.dir) / "trackers" / "book.json"
    memory.write_text("{")
    sitting_of(made, heard, first=4)
    assert heard.warnings == [] and book.sittings[0].id != book.sittings[1].id
    memory.unlink()
    memory.mkdir()
    sitting_of(made, heard, first=8)
    assert len(heard.warnings) == 1


def test_a_missing_package_is_said_before_anything_is_loaded(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch,
                                                             tmp_path: Path) -> None:
    made = recipe(output={"trackers": ["wandb"]}, base={"path": "nowhere.safetensors"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"needs the package wandb; pip install 'impasto\[wandb\]'"):
        train(made)
    folder = types.ModuleType("wandb")  # what Python makes of a folder of that name
    monkeypatch.setitem(sys.modules, "wandb", folder)
    with pytest.raises(UserError, match="needs the package wandb"):
        train(made)


def test_unknown_trackers_name_the_nearest(recipe: RecipeMaker) -> None:
    with pytest.raises(UserError, match="is no tracker; did you mean 'wandb'"):
        recipe(output={"trackers": ["wandbb"]})


def test_the_weights_are_the_same_with_a_tracker_and_without(recipe: RecipeMaker, book: type[Book]) -> None:
    with_it, without = train(recipe("a", output={"trackers": ["book"]})), train(recipe("b"))
    assert with_it.artifact is not None and without.artifact is not None
    from safetensors.torch import load_file
    a, b = load_file(with_it.artifact), load_file(without.artifact)
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    assert not {"trackers", "push_to"} & read_told(with_it.artifact).recipe["output"].keys()


def test_a_proof_of_resume_tells_nobody(recipe: RecipeMaker, book: type[Book]) -> None:
    assert verify_resume(recipe(output={"trackers": ["book"]})).exact
    assert book.told == []


# --- Weights & Biases ----------------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", library := StandIn())
    return library


def test_wandb_is_given_figures_pictures_and_the_same_id(recipe: RecipeMaker, library: StandIn) -> None:
    heard = Heard()
    made = recipe(output={"trackers": ["wandb"]}, sample={"every": 6, "steps": 1, "prompts": ["a dog"]},
                  validation={"fraction": 0.2, "every": 3})
    train(made, heard, stop_after=3)
    library.next_step = 5  # the server had more than the checkpoint: it takes no step twice
    train(made, heard)
    first, second = library.inits
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["project"] == "impasto"
    assert first["name"] == "dog" and first["config"]["method"][0]["rank"] == 4
    before, after = library.runs
    assert [step for step, _ in before.of("train/loss")] == [1, 2, 3]
    assert [step for step, _ in after.of("train/loss")] == [4, 5, 6]
    assert [step for _, step in after.logged] == [5, 5, 6, 6, 6]  # and no step twice
    lines = (Path(made.output.dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    assert before.of("train/loss") + after.of("train/loss") == losses
    validated = [(entry["step"], entry["validation"]) for entry in log if "validation" in entry]
    assert before.of("validation/loss") + after.of("validation/loss") == validated and len(validated) == 3
    pictures = [(step, [image.told for image in images]) for run in library.runs for step, images in run.of("previews")]
    assert pictures == [(0, [("000000-0.png", "a dog")]), (6, [("000006-0.png", "a dog")])]
    assert [run.metrics for run in library.runs] == [[("*", "step")]] * 2
    assert [run.exit_code for run in library.runs] == [0, 0]
    assert [run.summary for run in library.runs] == [{"ending": "stopped"}, {"ending": "finished"}]
    assert heard.warnings == before.warnings == after.warnings == []
    assert "wandb: https://wandb.test/run" in heard.notes


def test_wandb_offline_asks_for_nothing_on_the_web(recipe: RecipeMaker, library: StandIn) -> None:
    heard, library.mode, library.key = Heard(), "offline", False
    train(recipe(output={"trackers": ["wandb"]}, train={"steps": 2}), heard)
    (run,) = library.runs
    assert [step for step, _ in run.of("train/loss")] == [1, 2] and library.inits[0]["resume"] is None
    assert heard.warnings == run.warnings == [] and "wandb: kept in here; wandb sync sends it" in heard.notes


def test_wandb_is_told_of_a_failure(recipe: RecipeMaker, library: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_keep", lambda *_, **__: fail(RuntimeError("no memory"))())
    with pytest.raises(RuntimeError, match="no memory"):
        train(recipe(output={"trackers": ["wandb"]}))
    (run,) = library.runs
    assert run.exit_code == 1 and run.summary == {"ending": "failed"} and len(run.of("train/loss")) == 1


def test_wandb_without_a_key_is_one_warning_and_no_question(recipe: RecipeMaker, library: StandIn) -> None:
    heard, library.key = Heard(), False
    assert train(recipe(output={"trackers": ["wandb"]}, train={"steps": 2}), heard).artifact is not None
    assert library.inits == [] and len(heard.warnings) == 1 and "wandb login" in heard.warnings[0]


def test_what_stands_in_takes_what_the_real_library_takes() -> None:
    wandb = real_library()
    for name in ("init", "login", "setup", "Image.__init__", "Run.log", "Run.define_metric", "Run.finish"):
        pairs = [attrgetter(name)(owner) for owner in (wandb, StandIn)]
        names, own = ([key for key in inspect.signature(call).parameters if key != "self"] for call in pairs)
        assert names == own, name
    assert wandb.Settings.model_fields.keys() >= SETTINGS


def real_library() -> Any:
    """The package wandb, or the test is passed over."""
    if not hasattr(wandb := pytest.importorskip("wandb"), "init"):
        pytest.skip("a folder of that name is no package")
    return wandb


def test_the_real_library_offline(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    real_library()
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_CONFIG_DIR", str(tmp_path / "c")),
                        ("WANDB_CACHE_DIR", str(tmp_path / "k")), ("WANDB_DATA_DIR", str(tmp_path / "d"))):
        monkeypatch.setenv(name, value)
    importlib.import_module("wandb").teardown()  # settings are read once
    heard = Heard()
    made = recipe(output={"trackers": ["wandb"]}, train={"steps": 4}, sample={"every": 4, "steps": 1})
    train(made, heard, stop_after=2)
    train(made, heard)
    assert heard.warnings == []
    kept = sorted((Path(made.output.dir) / "wandb").glob("offline-run-*"))
    assert len(kept) == 2 and len({path.name.rpartition("-")[2] for path in kept}) == 1  # one id
    assert all(list(path.glob("run-*.wandb")) for path in kept)
    assert any("wandb sync" in note for note in heard.notes)
    kept_figures = [path.read_bytes() for folder in kept for path in folder.glob("run-*.wandb")]
    assert all(b"train/loss" in data for data in kept_figures)
    assert [len(list(path.glob("files/media/images/previews_*.png"))) for path in kept] == [1, 1]
    assert "URL not available" not in capsys.readouterr().err
    importlib.import_module("wandb").teardown()
