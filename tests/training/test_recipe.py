"""Recipes: short, typed, and merciless about typos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.training.recipe import READY, Recipe, load_recipe, make_recipe
from impasto.training.sections import TrainOptions

MINIMAL = {"base": {"path": "x.safetensors"}, "method": {"kind": "lora"}}


def test_two_sections_are_enough_and_one_method_may_stand_alone() -> None:
    recipe = make_recipe(MINIMAL)
    assert recipe.data is None and len(recipe.method) == 1 and recipe.method[0].kind == "lora"
    assert recipe.objective.kind == "denoise"


@pytest.mark.parametrize(("section", "key", "hint"), [
    ("train", "lerning_rate", "did you mean 'learning_rate'"),
    ("method", "rnak", "did you mean 'rank'"),
    ("base", "paht", "did you mean 'path'"),
    ("objective", "wieghting", "did you mean 'weighting'"),
    ("output", "nmae", "did you mean 'name'"),
    ("data", "foldr", "did you mean 'folder'"),  # and folder, which is needed, is missing
])
def test_unknown_keys_name_the_nearest(section: str, key: str, hint: str) -> None:
    tree = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: 1}}
    with pytest.raises(UserError, match=f"unknown key .*{key}.*{hint}"):
        make_recipe(tree)


def test_an_unknown_section_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown key 'tran'; did you mean 'train'"):
        make_recipe({**MINIMAL, "tran": {}})


@pytest.mark.parametrize(("section", "key", "value"), [
    ("train", "steps", 0), ("train", "learning_rate", -1.0), ("train", "precision", "fp8"),
    ("method", "rank", 0), ("train", "batch_size", "two"), ("output", "dtype", "int8")])
def test_values_out_of_range_are_one_line(section: str, key: str, value: object) -> None:
    tree = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: value}}
    with pytest.raises(UserError, match=key) as raised:
        make_recipe(tree)
    assert "\n" not in str(raised.value) and str(value) in str(raised.value)


def test_unknown_kinds_name_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown method 'lroa'; did you mean 'lora'"):
        make_recipe({**MINIMAL, "method": {"kind": "lroa"}})
    with pytest.raises(UserError, match="needs a kind"):
        make_recipe({**MINIMAL, "method": {"rank": 8}})


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(UserError, match="steps or epochs"):
        make_recipe({**MINIMAL, "train": {"steps": 1, "epochs": 1}})


def test_what_is_left_out_is_what_the_optimizer_recommends() -> None:
    def train(**keys: Any) -> TrainOptions:
        return make_recipe({**MINIMAL, "train": keys}).train

    adamw, lion, prodigy = train(), train(optimizer="lion"), train(optimizer="prodigy", weight_decay=0.1)
    assert (adamw.learning_rate, adamw.betas, adamw.weight_decay, adamw.eps) == (1e-4, (0.9, 0.999), 0.01, 1e-8)
    assert (lion.betas, lion.eps) == ((0.9, 0.99), None) and lion.learning_rate < 1e-4
    assert (prodigy.learning_rate, prodigy.weight_decay) == (1.0, 0.1)
    assert train(optimizer="prodigy", learning_rate=0.5).learning_rate == 0.5
    adamw.steps = 3  # assignment validates again
    assert adamw.learning_rate == 1e-4 and make_recipe({**MINIMAL, "train": lion.model_dump()}).train == lion
    with pytest.raises(UserError, match="train: sgd has no betas"):
        train(optimizer="sgd", betas=[0.9, 0.99])


@pytest.mark.parametrize(("keys", "line"), [
    ({"optimizer": "adamv"}, "train.optimizer: is no optimizer; did you mean 'adamw'"),
    ({"optimizer": "torch.optim:"}, "is no optimizer"),
    ({"warmup": 1.5}, "neither a whole number of steps nor a share"),
    ({"restarts": 2}, "restarts belongs to schedule = \"cosine_with_restarts\""),
    ({"schedule": "linear", "power": 2}, "power belongs to schedule = \"polynomial\""),
    ({"rates": {"unet": -1}}, "train.rates.unet"),
])
def test_what_the_loop_cannot_do_is_one_line(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        make_recipe({**MINIMAL, "train": keys})
    assert "\n" not in str(raised.value)


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[base]\npath = "x"\n[[method]]\nkind = "lora"\n', encoding="utf-8")
    recipe = load_recipe(str(file), ["method.rank=8", "train.learning_rate=3e-4", "output.dir=runs/my dog"])
    assert recipe.method[0].model_dump()["rank"] == 8
    assert recipe.train.learning_rate == 3e-4 and recipe.output.dir == "runs/my dog"

    taken = load_recipe("mini/dreambooth", ["prior.folder=", "prior.caption=a heart", "train.warmup="])
    assert taken.prior is not None and taken.prior.folder is None and taken.train.warmup == 0
    assert load_recipe(str(file), ["output.dir="]) == load_recipe(str(file))  # as it is not there

    file.write_text('[base]\npath = "x"\n[[method]]\nkind = "lora"\n[[method]]\nkind = "lora"\n', encoding="utf-8")
    recipe = load_recipe(str(file), ["method.1.rank=4"])
    assert [m.model_dump()["rank"] for m in recipe.method] == [16, 4]
    with pytest.raises(UserError, match="there are 2 methods"):
        load_recipe(str(file), ["method.rank=4"])
    with pytest.raises(UserError, match="there is no method 2"):
        load_recipe(str(file), ["method.2.rank=4"])
    with pytest.raises(UserError, match="is not section.key=value"):
        load_recipe(str(file), ["rank"])


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[base\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(str(tmp_path / "r.toml"))
    with pytest.raises(UserError, match="no such recipe.*did you mean 'dreambooth_lora'"):
        load_recipe("dreambooth_lor")


def test_ready_recipes_ship_and_are_valid() -> None:
    names = [path.relative_to(READY).with_suffix("").as_posix() for path in READY.rglob("*.toml")]
    assert {"lora", "dreambooth_lora", "textual_inversion", "pivotal", "full", "dreambooth_full", "partial",
            "vae_decoder"} <= set(names)
    for name in names:
        own = name.startswith("mini/")  # those bring base and pictures
        recipe = load_recipe(name, [] if own else ["base.path=x.safetensors", "data.folder=photos"])
        assert make_recipe(recipe.plain()) == recipe


def test_every_key_says_what_it_is() -> None:
    def check(model: type, path: str) -> None:
        for name, field in model.model_fields.items():
            if name != "kind":
                assert field.description, f"{path}.{name}"

    for name, field in Recipe.model_fields.items():
        if name not in ("method", "objective"):
            section = field.annotation if isinstance(field.annotation, type) else field.annotation.__args__[0]
            check(section, name)
    from impasto.methods import METHODS
    from impasto.objectives import OBJECTIVES
    for registry in (METHODS, OBJECTIVES):
        for name in registry:
            check(registry.get(name).Options, name)


#: The list of options is an interface: a new one is added here on purpose, and none goes by accident.
OPTIONS = {
    "base": "adapters clip_skip download family init options path prediction quantize quantize_text text_encoders vae",
    "data": "background bad_samples both_dropout brightness bucket_max bucket_min bucket_step buckets cache "
            "caption caption_dropout caption_loss_weights caption_source caption_template caption_weights "
            "contrast doodles flip folder hue inpaint inpaint_masks keep_tags keep_tags_separator loss_weight "
            "mask mask_floor mask_normalised masks max_tokens missing_captions missing_masks pairs pictures "
            "random_crop repeats resolution resolutions rotate saturation shards share shuffle_tags "
            "shuffle_window source source_dropout sources tag_dropout tag_separator upscale variants wildcards "
            "zoom",
    "train": "accumulation batch_size betas checkpointing clip compile deterministic device ema epochs eps fit "
             "fused_backward learning_rate offload optimizer optimizer_options power precision rates restarts "
             "schedule seed steps warmup weight_decay",
    "validation": "every folder fraction keep_best patience repeats",
    "sample": "every guidance image_guidance negative prompts scheduler seed size steps",
    "output": "checkpoint_every dir dtype format keep keep_every metadata name push_private push_to save_every "
              "save_every_epochs track_every trackers",
}


@pytest.mark.parametrize("section", OPTIONS)
def test_the_list_of_options_is_frozen(section: str) -> None:
    annotation = Recipe.model_fields[section].annotation
    model = annotation if isinstance(annotation, type) else annotation.__args__[0]
    assert sorted(model.model_fields) == OPTIONS[section].split()
