"""Each setting, where it comes from, and why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from impasto.core.errors import UserError
from impasto.training.explain import Explanation, explain
from impasto.training.recipe import READY, Recipe, load_recipe

RECIPE = """
[base]
path = "x.safetensors"
[data]
folder = "photos"
[method]
kind = "lora"
rank = 8
ranks = { attn1 = 4, attn2 = 8 }
alphas = {}
[train]
steps = 7
betas = [0.9, 0.99]
"""


def origins(told: Explanation, wanted: str) -> set[str]:
    """The settings of one origin, dotted."""
    return {f"{part.name}.{each.key}" for part in told.parts for each in part.settings if each.origin == wanted}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.toml").write_text(RECIPE)
    return str(tmp_path / "r.toml")


def test_where_each_setting_comes_from(recipe: str) -> None:
    told = explain(recipe, ["train.steps=9", "method.alpha=4", "method.ranks={attn1=2}", "sample.every=0",
                            "prior.caption=a dog", "objective.weighting=min_snr"])
    assert origins(told, "recipe") == {"base.path", "data.folder", "method.kind", "method.rank", "method.alphas",
                                       "train.betas"}
    assert origins(told, "command line") == {"train.steps", "method.alpha", "method.ranks", "sample.every",
                                             "prior.caption", "objective.weighting"}
    assert {"train.learning_rate", "objective.kind", "prior.weight"} <= origins(told, "default")


@pytest.mark.parametrize("override", ["train.steps=7", "method.rank=8", "method.ranks.attn1=4",
                                      "method.alphas={}"])
def test_the_same_value_on_the_command_line_is_the_command_lines(override: str, recipe: str) -> None:
    key = override.partition("=")[0].removesuffix(".attn1")
    assert origins(explain(recipe, [override]), "command line") == {key}
    assert key in origins(explain(recipe), "recipe")


def test_values_are_those_of_the_checked_recipe_in_its_order(recipe: str) -> None:
    told = explain(recipe, ["train.steps=9"])
    plain = load_recipe(recipe, ["train.steps=9"]).plain()
    assert [part.name for part in told.parts] == list(Recipe.model_fields)
    for part in told.parts:
        values = plain[part.name][0] if part.name == "method" else plain[part.name] or {}
        values |= {"resolution": None} if part.name == "data" else {}  # the base's own
        assert {each.key: each.value for each in part.settings} == values
        assert part.about and all(each.why for each in part.settings)


def test_a_section_that_is_not_asked_for_has_no_settings_and_says_what_it_is(recipe: str) -> None:
    prior = next(part for part in explain(recipe).parts if part.name == "prior")
    assert prior.settings == () and prior.about.startswith("class pictures")


def test_several_methods_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[base]\npath = "x"\n' + '[[method]]\nkind = "lora"\n' * 2)
    told = explain(str(tmp_path / "r.toml"), ["method.1.rank=4"])
    assert {"method.0", "method.1"} <= {part.name for part in told.parts}
    assert origins(told, "command line") == {"method.1.rank"}
    assert origins(told, "recipe") == {"base.path", "method.0.kind", "method.1.kind"}


def test_ready_recipes_are_explained() -> None:
    for path in READY.rglob("*.toml"):
        own = path.parent.name == "mini"
        told = explain(path.relative_to(READY).with_suffix("").as_posix(),
                       [] if own else ["base.path=x", "data.folder=p"])
        assert told.path == path and told.plain()["settings"]


def test_a_bad_recipe_is_the_same_one_line(recipe: str) -> None:
    with pytest.raises(UserError, match="unknown key 'train.stps'; did you mean 'steps'"):
        explain(recipe, ["train.stps=1"])


@pytest.mark.parametrize("name", ["lora", "dreambooth_lora", "mini/pretrain"])
def test_no_torch_is_loaded(name: str) -> None:
    code = ("import sys\nfrom impasto.training.explain import explain\n"
            f"explain({name!r}, {[] if '/' in name else ['base.path=x', 'data.folder=p']!r})\n"
            "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
