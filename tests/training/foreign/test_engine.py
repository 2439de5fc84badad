from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from impasto.core.errors import UserError
from impasto.methods import METHODS
from impasto.objectives import OBJECTIVES
from impasto.training.foreign import SOURCES, import_recipe
from impasto.training.foreign.engine import Work, accepts, flatten, value_at
from impasto.training.foreign.table import Row, flag, named, nothing, number, rows, several, text, whole
from impasto.training.recipe import Recipe, make_recipe
from tests.training.foreign.importing import checked

TABLES = ["kohya", "onetrainer"]
MINIMAL = {"base": {"path": "x"}, "method": {"kind": "lora"}}


def recipe_keys() -> set[str]:
    """Every key that some recipe may have, dotted."""
    keys = set()
    for section, field in Recipe.model_fields.items():
        if section in ("method", "objective"):
            registry = METHODS if section == "method" else OBJECTIVES
            models = [registry.get(name).Options for name in registry]
        else:
            models = [field.annotation] if isinstance(field.annotation, type) else \
                [each for each in field.annotation.__args__ if each is not type(None)]
        keys |= {f"{section}.{key}" for model in models for key in model.model_fields}
    return keys


@pytest.mark.parametrize("table", TABLES)
def test_every_key_of_the_tables_leads_to_a_recipe_key_or_says_why_not(table: str) -> None:
    known = recipe_keys()
    table_rows = importlib.import_module(f"impasto.training.foreign.{table}").ROWS
    for key, row in table_rows.items():
        assert row.to in known or not row.to and row.why, key
        assert row.here in known or not row.here, key
        assert not (row.to and row.here) and not (row.to and row.needless), key


def test_each_trainer_is_there_and_has_a_title() -> None:
    assert {SOURCES.get(name)().title for name in SOURCES} and len(list(SOURCES)) == 2


@pytest.mark.parametrize(("turn", "value", "expected"), [
    (whole, "512", 512), (whole, 4.0, 4), (number, "1e-4", 1e-4), (flag, "True", True), (flag, 0, False),
    (text, 7, "7"), (several, "(0.9, 0.99)", [0.9, 0.99]), (several, [1, "2"], [1, 2]), (several, 3, [3]),
    (named({"l2": "mse"}), "L2", "mse")])
def test_values_are_read_from_texts_too(turn, value, expected) -> None:
    assert turn(value) == expected and type(turn(value)) is type(expected)


@pytest.mark.parametrize(("turn", "value"), [
    (whole, "4.5"), (whole, True), (number, "nan"), (number, "1e999"), (number, 10**400), (number, None), (number, []),
    (flag, "maybe"), (text, ["a"]), (text, "\ud800"), (named({"a": 1}), "b"), (several, "0.9 x")])
def test_values_that_cannot_be_read(turn, value) -> None:
    with pytest.raises(ValueError):
        turn(value)


def test_nothing_is_nothing() -> None:
    assert all(nothing(value) for value in (None, "", [], {}))
    assert not any(nothing(value) for value in (0, False, "0"))
    assert nothing("100.0", ("100",)) and nothing("ADAMW", ("adamw",)) and not nothing("101", ("100",))


def test_rows_share_a_reason() -> None:
    found = rows("why", "a b=100", here="train.steps")
    assert found == {"a": Row(why="why", here="train.steps"),
                     "b": Row(why="why", here="train.steps", neutral=("100",))}


def work(settings: dict, **table: Row) -> Work:
    made = Work("a trainer", {"base": Row("base.path", text), **table}, {"base": "x", **settings})
    made.put("method.kind", "lora", why="for a test")
    return made


def test_each_setting_is_told_of_once(tmp_path: Path) -> None:
    table = {"steps": Row("train.steps", whole), "rate": Row("train.learning_rate", number),
             "magic": Row(why="there is no magic", here="train.optimizer"), "off": Row(why="none"),
             "fast": Row(why="it is fast", needless=True), "parts.*": Row(why="no such parts")}
    found = checked(tmp_path, work({"steps": "5", "rate": "quick", "magic": 3, "off": 0, "fast": True, "parts.a.b": 1,
                                    "new": "x"}, **table).finish(["f"]))
    assert found.tree["train"] == {"steps": 5}
    assert {(left.key, left.why, left.here, left.instead) for left in found.lost} == {
        ("rate", "is no number", "train.learning_rate", 1e-4),
        ("magic", "there is no magic", "train.optimizer", "adamw"), ("parts.a.b", "no such parts", "", None)}
    assert [left.key for left in found.needless] == ["fast"]
    assert [left.key for left in found.unknown] == ["new"] and found.without_effect == ["off"]


@pytest.mark.parametrize(("settings", "refused", "kept"), [
    ({"steps": 0}, {"steps"}, {}), ({"steps": 7, "rate": -1}, {"rate"}, {"steps": 7}),
    ({"steps": 7, "epochs": 3}, {"epochs"}, {"steps": 7})])
def test_what_the_recipe_refuses_is_told_of_and_left_out(settings, refused, kept, tmp_path: Path) -> None:
    table = {"steps": Row("train.steps", whole), "rate": Row("train.learning_rate", number),
             "epochs": Row("train.epochs", whole)}
    found = checked(tmp_path, work(settings, **table).finish(["f"]))
    assert found.tree.get("train", {}) == kept
    assert {left.key for left in found.lost} == refused
    assert all("the recipe refuses" in left.why for left in found.lost)


def test_two_keys_for_one_of_ours_the_first_counts(tmp_path: Path) -> None:
    table = {"a": Row("train.seed", whole), "b": Row("train.seed", whole)}
    found = checked(tmp_path, work({"a": 1, "b": 2}, **table).finish(["f"]))
    assert found.tree["train"] == {"seed": 1} and "a says another value" in found.lost[0].why
    assert not checked(tmp_path, work({"a": 1, "b": 1}, **table).finish(["f"])).lost


@pytest.mark.parametrize("key", ["wandb_api_key", "huggingface_token", "secrets.cloud.password", "secrets.cloud.user"])
def test_secrets_are_not_repeated(key: str, tmp_path: Path) -> None:
    found = checked(tmp_path, work({key: "hunter2"}).finish(["f"]))
    assert "hunter2" not in str(found.plain()) and "(hidden)" in str(found.unknown)


def test_words_of_a_foreign_file_stay_in_their_comment(tmp_path: Path) -> None:
    found = checked(tmp_path, work({"new": "x\n[train]\nsteps = 1\x1b[31m\u2028y"}).finish(["a\nb"]))
    assert "train" not in found.tree and "\x1b" not in found.toml()


def test_helpers() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
    recipe = make_recipe(MINIMAL)
    assert value_at(recipe, "method.rank") == 16 and value_at(recipe, "train.clip") == 1.0
    assert value_at(recipe, "prior.weight") is None and value_at(recipe, "") is None
    assert accepts("train.optimizer", "adamw") and not accepts("train.optimizer", "frobnicate")


@pytest.mark.parametrize(("name", "content", "told"), [
    ("a.toml", '[base]\npath = "x"\n[method]\nkind = "lora"\n', "is a recipe of Impasto's already"),
    ("a.json", '{"LoRA_type": "Standard", "epoch": 1}', "kohya's GUI"),
    ("a.json", '{"steps": 3}', "is none of what can be read"),
    ("a.json", "[]", "is none of what can be read"),
    ("a.json", "[" * 100_000, "is none of what can be read"),
    ("a.toml", "x = " + "9" * 5000, "is none of what can be read"),
    ("a.txt", "Dear diary, today I trained a LoRA.", "is none of what can be read"),
    ("a.txt", "", "is none of what can be read"),
    ("a.safetensors", b"\x80\x02\xff\x00" * 8, "is no text"),
    ("a.bin", b"a\0b", "is no text"),
    ("a.txt", b"x" * 4_000_001, "is too large"),
])
def test_other_files_are_one_line(name, content, told, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told) as raised:
        import_recipe([tmp_path / name])
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_a_missing_file_and_files_of_two_trainers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        import_recipe([tmp_path / "none"])
    (tmp_path / "a.json").write_text('{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}')
    (tmp_path / "b.txt").write_text("train_network.py --seed 1")
    with pytest.raises(UserError, match="belong to different trainers"):
        import_recipe([tmp_path / "a.json", tmp_path / "b.txt"])
