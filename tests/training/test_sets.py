"""Runs over several sets: trained, weighed, resumed, refused, told of and made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.core.progress import SILENT
from impasto.core.rng import Draws, seed_for
from impasto.training.explain import explain
from impasto.training.previews import Previews
from impasto.training.recipe import Recipe, load_recipe, make_recipe
from impasto.training.reproduce import reproduce
from impasto.training.run import Run
from impasto.training.sharing.card import public
from impasto.training.trainer import Trainer, train
from tests.training.conftest import draw, tree

RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    for key in range(3):
        draw(folder / f"o{key}.png", 40 + key, (64, 64))
    return folder


@pytest.fixture
def two(mini: Path, photos: Path, other: Path, tmp_path: Path) -> RecipeMaker:
    """A run over two sets; `one` and `more` are keys of theirs."""
    def make(name: str = "run", one: dict[str, Any] | None = None, more: dict[str, Any] | None = None,
             **sections: Any) -> Recipe:
        made: dict[str, Any] = tree(mini, photos, tmp_path / name, **sections)
        made["data"] = [made["data"] | (one or {}),
                        {"folder": str(other), "caption": "a cat", "resolution": 64} | (more or {})]
        return make_recipe(made)
    return make


def weights(made: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(made.output.dir) / "dog.safetensors")


def losses(made: Recipe) -> list[float]:
    lines = (Path(made.output.dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("how", [({}, {"repeats": 3}), ({"share": 1}, {"share": 2, "flip": True}),
                                 ({"rotate": 5, "hue": 0.1, "variants": 2}, {"random_crop": True, "zoom": 0.2}),
                                 ({"resolutions": [64, 128], "resolution": 128, "upscale": "never"}, {})])
def test_a_stopped_run_ends_as_an_uninterrupted_one(two: RecipeMaker, how: tuple) -> None:
    train(two("straight", *how))
    train(two("stopped", *how), stop_after=3)
    assert train(two("stopped", *how)).resumed_from == 3
    a, b = weights(two("straight")), weights(two("stopped"))
    assert all(a[key].equal(b[key]) for key in a) and losses(two("straight")) == losses(two("stopped"))


def test_a_weighted_loss_is_the_weighted_mean(two: RecipeMaker) -> None:
    """The first step's loss, by hand: each picture's own loss times its set's weight, over their number."""
    made = two(one={"loss_weight": 2.0}, more={"loss_weight": 0.25}, train={"batch_size": 3, "accumulation": 3})
    train(made, stop_after=1)
    trainer = Trainer(two("by hand", train={"batch_size": 3, "accumulation": 3}), Run(Path("nowhere"), "x", SILENT),
                      SILENT)
    total, met = 0.0, set()
    for micro, batches in enumerate(trainer.source.micro_batches(0)):
        torch.manual_seed(seed_for(0, 0, micro, 0))
        for batch in batches:
            own = trainer.objective.loss(trainer.base, batch, Draws(0, 0, batch.samples))
            for name, loss in zip(batch.names, own.tolist(), strict=True):
                met.add(name[0] == "o")
                total += loss * (0.25 if name[0] == "o" else 2.0)
    assert met == {True, False} and losses(made) == [pytest.approx(total / 9, rel=1e-5)]


def test_a_set_without_weight_teaches_nothing(two: RecipeMaker) -> None:
    """Weights after a run in which the second set weighs nothing do not depend on what it shows."""
    train(two("a", more={"loss_weight": 0.0}))
    train(two("b", more={"loss_weight": 0.0, "caption": "something else"}))
    train(two("c", more={"caption": "something else"}))
    a, b, c = (weights(two(name)) for name in "abc")
    assert all(a[key].equal(b[key]) for key in a) and any(not a[key].equal(c[key]) for key in a)


def test_another_set_is_another_run(two: RecipeMaker, other: Path) -> None:
    train(two(), stop_after=2)
    with pytest.raises(UserError, match=r"another recipe.*data\.1\.repeats 1 -> 2"):
        train(two(more={"repeats": 2}))
    draw(other / "o1.png", 77, (64, 64))
    with pytest.raises(UserError, match="the pictures, their captions or their cuts have changed"):
        train(two())


def test_an_artifact_tells_of_all_sets_and_of_no_place(two: RecipeMaker, other: Path, photos: Path) -> None:
    made = two()
    artifact = train(made).artifact
    assert artifact is not None
    with safe_open(artifact, "pt") as file:
        told = json.loads(file.metadata()["impasto.recipe"])
    assert [one["folder"] for one in told["data"]] == [photos.name, "other"]
    assert [sorted({"folder", "cache"} & one.keys()) for one in public(made)["data"]] == [[], []]

    places = [f"base.path={made.base.path}", f"data.0.folder={photos}", f"data.1.folder={other}"]
    found = reproduce(artifact, places)
    assert found.differs == [] and found.unknown == []
    assert "data.0.folder=" in reproduce(artifact, places[:1]).unknown[0]
    with pytest.raises(UserError, match="there are 2 sets of pictures.*say which: data.0.folder"):
        reproduce(artifact, [f"data.folder={photos}"])
    shutil.copy(photos / "0.png", other / "new.png")
    assert any("pictures" in line for line in reproduce(artifact, places).differs)


def test_previews_show_each_caption_and_the_largest_size(two: RecipeMaker, tmp_path: Path) -> None:
    previews = Previews(two(more={"resolution": 128, "caption_template": "{} here"}, sample={"every": 1}), tmp_path)
    assert previews.prompts == ["a photo of sks dog", "a cat here"]
    assert (previews.settings.width, previews.settings.height) == (128, 128)


# --- recipes -----------------------------------------------------------------------------------------------

RECIPE = """
[base]
path = "x"
[[data]]
folder = "one"
[[data]]
folder = "two"
flip = true
[method]
kind = "lora"
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    return str(tmp_path / "r.toml")


def test_settings_say_which_set_they_mean(file: str) -> None:
    recipe = load_recipe(file, ["data.0.repeats=10", "data.1.flip=false"])
    assert recipe.data is not None
    assert [(one.folder, one.repeats, one.flip) for one in recipe.data.sets] == [("one", 10, False), ("two", 1, False)]
    assert make_recipe(recipe.plain()) == recipe
    for setting, line in (("data.flip=true", "there are 2 sets of pictures.*say which: data.0.flip, data.1.flip"),
                          ("data.2.flip=true", "there is no set of pictures 2.*from 0 to 1"),
                          ("data.1.flp=true", "unknown key 'data.1.flp'; did you mean 'flip'")):
        with pytest.raises(UserError, match=line):
            load_recipe(file, [setting])


def test_a_single_set_may_be_a_list_or_a_table() -> None:
    minimal = {"base": {"path": "x"}, "method": {"kind": "lora"}}
    one = make_recipe({**minimal, "data": {"folder": "a"}})
    assert make_recipe({**minimal, "data": [{"folder": "a"}]}) == one


def test_the_only_set_is_number_0(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    for table in ("[data]", "[[data]]"):
        path.write_text(alone(table), encoding="utf-8")
        for setting in ("data.0.flip=true", "data.flip=true"):
            recipe = load_recipe(str(path), [setting])
            assert recipe.data is not None and [one.flip for one in recipe.data.sets] == [True]
            told = {(part.name, each.key): each.origin for part in explain(str(path), [setting]).parts
                    for each in part.settings}
            assert told["data", "flip"] == "command line" and told["data", "folder"] == "recipe"


def alone(table: str) -> str:
    """A recipe with one set."""
    return f'{table}\nfolder = "a"\n[base]\npath = "x"\n[method]\nkind = "lora"\n'


def test_each_set_is_explained(file: str) -> None:
    told = explain(file, ["data.0.flip=true"])
    found = {(part.name, each.key): (each.value, each.origin) for part in told.parts for each in part.settings}
    assert found["data.0", "flip"] == (True, "command line") and found["data.1", "flip"] == (True, "recipe")
    assert found["data.1", "repeats"] == (1, "default")


@pytest.mark.parametrize(("sets", "line"), [
    ([{"share": 1}, {}], "data: data.1 has no share, and others have: give all sets one, or none"),
    ([{"share": 1, "repeats": 2}, {"share": 1}], "data.0: give repeats or share, not both"),
    ([{"share": 0}, {"share": 1}], "data.0.share: Input should be greater than 0"),
    ([{"repeats": 0}, {}], "data.0.repeats: Input should be greater than or equal to 1"),
    ([{"loss_weight": -1}, {}], "data.0.loss_weight"),
    ([{"cache": "a"}, {"cache": "b"}], "all sets have one cache: say it once"),
    ([{"share": 1}], "share is of several sets"),
    ([], "data: "),
    ([{}, {"source": "world"}], "data.1: source = \"world\" draws pictures"),
])
def test_sets_that_do_not_go_together_are_one_line(sets: list[dict], line: str) -> None:
    made = {"base": {"path": "x"}, "method": {"kind": "lora"}, "data": [{"folder": "a"} | one for one in sets]}
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as raised:
        make_recipe(made)
    assert "\n" not in str(raised.value)
