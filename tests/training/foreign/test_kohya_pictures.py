"""Pictures, captions and sets of them in settings of kohya's scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from impasto.core.errors import UserError
from impasto.training.foreign import import_recipe
from impasto.training.foreign.engine import Imported
from tests.training.foreign.importing import became, checked, fate, imported, line, reason


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "a.png").touch()
    return root


def test_the_only_folder_gives_repeats_and_caption(tmp_path: Path) -> None:
    data, classes = folders(tmp_path / "data", "10_sks dog"), folders(tmp_path / "reg", "1_dog", "notes")
    found = line(tmp_path, f'--train_data_dir="{data}" --reg_data_dir="{classes}" --max_train_epochs=3 '
                           "--caption_extension=.txt")
    keys = became(found)
    assert keys["data.folder"] == str(data / "10_sks dog") and keys["data.caption"] == "sks dog"
    assert keys["prior.folder"] == str(classes / "1_dog") and keys["prior.caption"] == "dog"
    assert keys["train.epochs"] == 30 and any("on top of" in note for note in found.notes)


def test_captions_beside_the_pictures_go_before_the_folders_name(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", "10_sks dog")
    (data / "10_sks dog" / "a.txt").write_text("a dog")
    found = line(tmp_path, f'--train_data_dir="{data}" --max_train_steps=100')
    assert "data.caption" not in became(found) and "here are caption files" in reason(found, "class_tokens")
    assert became(found)["train.steps"] == 100 and fate(found, "num_repeats") == "needless"


@pytest.mark.parametrize(("arguments", "wanted"), [
    ("--caption_extension=.caption", {"caption_source": "caption"}),
    ("--caption_extention=txt", {"caption_source": "txt"}),
    ("--shuffle_caption --keep_tokens=1 --caption_separator=;", {
        "shuffle_tags": True, "keep_tags": 1, "tag_separator": ";"}),
    ("--shuffle_caption --keep_tokens_separator=###", {"shuffle_tags": True, "keep_tags_separator": "###"}),
    ("--keep_tokens=3", {}),
    ("--caption_tag_dropout_rate=0.1 --keep_tokens=3", {"tag_dropout": 0.1, "keep_tags": 3}),
    ("--caption_prefix='a photo of'", {"caption_template": "a photo of {}"}),
    ("--caption_prefix=sks, --caption_suffix='by me' --shuffle_caption --keep_tokens=2", {
        "caption_template": "sks, {} by me", "shuffle_tags": True, "keep_tags": 1}),
    ("--enable_wildcard --weighted_captions", {"wildcards": True, "caption_weights": True}),
])
def test_what_is_done_with_captions(arguments: str, wanted: dict, tmp_path: Path) -> None:
    found = line(tmp_path, f"--train_data_dir=a {arguments}")
    ours = ("caption", "tag", "shuffle", "keep", "wildcards")
    assert {key[5:]: value for key, value in became(found).items()
            if key.startswith(tuple(f"data.{word}" for word in ours)) or key == "data.tag_separator"} == wanted
    assert not [left for left in found.lost if "caption" in left.key or "token" in left.key]


@pytest.mark.parametrize(("arguments", "key", "here"), [
    ("--caption_extension=.cap", "caption_extension", "data.caption_source"),
    ("--caption_tag_dropout_rate=2", "caption_tag_dropout_rate", "data.tag_dropout"),
    ("--token_warmup_step=100", "token_warmup_step", "data.tag_dropout"),
    ("--secondary_separator=;", "secondary_separator", "data.tag_separator"),
    ("--in_json=meta.json", "in_json", "data.caption_source"),
    ("--keep_tokens=many --shuffle_caption", "keep_tokens", "data.keep_tags"),
])
def test_what_is_not_done_with_captions(arguments: str, key: str, here: str, tmp_path: Path) -> None:
    found = line(tmp_path, f"--train_data_dir=a {arguments}")
    left = next(left for left in found.lost if left.key == key)
    assert left.here == here and left.why


@pytest.mark.parametrize("names", [(), ("none",)])
def test_a_folder_without_numbered_ones_is_told_of(names: tuple[str, ...], tmp_path: Path) -> None:
    data = folders(tmp_path / "data", *names)
    found = line(tmp_path, f'--train_data_dir="{data}" --max_train_epochs=3')
    assert became(found)["data.folder"] == str(data) and became(found)["train.epochs"] == 3
    assert any("10_" in note and "equally often" in note for note in found.notes)


def test_prompts_of_previews(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# mine\na dog --n ugly --w 512 --s 30 --l 7\n\na cat --n ugly --s 20 --d 1\n")
    found = line(tmp_path, f'--sample_prompts="{tmp_path / "p.txt"}"')
    keys = became(found)
    assert keys["sample.prompts"] == ["a dog", "a cat"] and keys["sample.negative"] == "ugly"
    assert keys["sample.guidance"] == 7.0 and "sample.steps" not in keys
    assert any("several --s" in note for note in found.notes)


def test_several_folders_are_several_sets(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", "10_a dog", "5_b", "old")
    (data / "5_b" / "a.txt").write_text("a cat")
    found = line(tmp_path, f'--train_data_dir="{data}" --max_train_epochs=3 --resolution=768 --flip_aug '
                           "--caption_extension=.txt --caption_tag_dropout_rate=0.5")
    keys = became(found)
    assert keys["data.0.folder"] == str(data / "10_a dog") and keys["data.1.folder"] == str(data / "5_b")
    assert (keys["data.0.repeats"], keys["data.1.repeats"], keys["train.epochs"]) == (10, 5, 3)
    assert keys["data.0.caption"] == "a dog" and "data.1.caption" not in keys
    assert "here are caption files" in reason(found, "train_data_dir.5_b.class_tokens")
    for key, value in {"resolution": 768, "flip": True, "tag_dropout": 0.5, "buckets": False}.items():
        assert keys[f"data.0.{key}"] == keys[f"data.1.{key}"] == value


DATASET = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
enable_bucket = true

[[datasets]]
resolution = [512, 512]
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'one'
  class_tokens = 'sks dog'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = 'two'
  keep_tokens = 3
  num_repeats = 3
  wizardry = 1
  caption_tag_dropout_rate = 7

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'classes'
  class_tokens = 'dog'
  flip_aug = true

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'more classes'

[[datasets]]
resolution = 768
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'three'
  num_repeats = 10
"""


def check_dataset(found: Imported) -> None:
    keys = became(found)
    assert [keys[f"data.{i}.folder"] for i in range(3)] == ["one", "two", "three"]
    assert [keys[f"data.{i}.repeats"] for i in range(3)] == [10, 3, 10]
    assert [keys[f"data.{i}.resolution"] for i in range(3)] == [512, 512, 768]
    assert [keys[f"data.{i}.keep_tags"] for i in range(3)] == [2, 3, 1]
    assert all(keys[f"data.{i}.buckets"] and keys[f"data.{i}.shuffle_tags"] and keys[f"data.{i}.caption_source"] ==
               "txt" for i in range(3))
    assert [keys.get(f"data.{i}.bucket_max") for i in range(3)] == [None, None, 1024]  # kohya's own, at any size
    assert keys["train.batch_size"] == 4 and keys["prior.folder"] == "classes"
    lost = {left.key: left.value for left in (*found.lost, *found.unknown)}
    assert {key: value for key, value in lost.items() if key.startswith("datasets.")} == {
        "datasets.0.subsets.3.image_dir": "more classes", "datasets.1.subsets.0.train_batch_size": 2,
        "datasets.0.subsets.1.wizardry": 1, "datasets.0.subsets.1.caption_tag_dropout_rate": 7}
    assert lost["reg.flip_aug"] is True
    assert "all sets have one" in reason(found, "datasets.1.subsets.0.train_batch_size")
    assert "give data.caption" in reason(found, "class_tokens")
    assert "give prior.caption" in reason(found, "reg.class_tokens")


def test_a_dataset_config_alone(tmp_path: Path) -> None:
    found = imported(tmp_path, DATASET, "dataset.toml")
    check_dataset(found)
    assert list(found.to_fill_in) == ["base.path"] and found.tree["base"]["path"]


@pytest.mark.parametrize("way", ["beside", "given"])
@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_config_with_its_dataset_config(way: str, suffix: str, tmp_path: Path) -> None:
    import tomllib

    (tmp_path / "config.toml").write_text(
        'pretrained_model_name_or_path = "a.ckpt"\nmax_train_epochs = 2\ntrain_batch_size = 9\n'
        f'train_data_dir = "ignored"\ndataset_config = "/elsewhere/dataset.{suffix}"\n')
    dataset = tmp_path / f"dataset.{suffix}" if way == "beside" else tmp_path / "given" / f"dataset.{suffix}"
    dataset.parent.mkdir(exist_ok=True)
    dataset.write_text(DATASET if suffix == "toml" else json.dumps(tomllib.loads(DATASET)))
    paths = [tmp_path / "config.toml", *([dataset] if way == "given" else [])]
    found = checked(tmp_path, import_recipe(paths))
    check_dataset(found)
    assert became(found)["base.path"] == "a.ckpt" and became(found)["train.epochs"] == 2
    assert fate(found, "train_data_dir") == "needless" and found.files == [str(tmp_path / "config.toml"), str(dataset)]


def test_what_a_command_says_holds_for_all_subsets_that_do_not(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text("""
        [[datasets]]
        subsets = [{image_dir = "a", color_aug = true, is_reg = false}, {image_dir = "b", flip_aug = false}, {},
                   {image_dir = "c", num_repeats = 0}]
        """)
    found = line(tmp_path, "--dataset_config=d.toml --flip_aug --caption_dropout_rate=0.1 --class_tokens=x")
    keys = became(found)
    assert (keys["data.0.flip"], keys.get("data.1.flip"), keys["data.2.flip"]) == (True, False, True)
    assert [keys[f"data.{i}.caption_dropout"] for i in range(3)] == [0.1] * 3
    assert "it names no folder" in reason(found, "datasets.0.subsets.2")
    assert next(each for each in found.lost if each.key == "datasets.0.subsets.3.num_repeats").instead == 1


def test_a_command_with_its_config_the_command_goes_first(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('pretrained_model_name_or_path = "a.ckpt"\nseed = 1\nnetwork_dim = 8\n')
    found = imported(tmp_path, "accelerate launch sdxl_train_network.py --config_file=config --seed=2", "run.sh")
    assert became(found)["train.seed"] == 2 and became(found)["method.rank"] == 8


def test_files_that_cannot_be_seen_are_told_of(tmp_path: Path) -> None:
    found = line(tmp_path, "--dataset_config=nowhere.toml --config_file=nowhere")
    assert "give it as a second one" in reason(found, "dataset_config") + reason(found, "config_file")
    assert fate(found, "config_file") == "lost" and "data.folder" in found.to_fill_in


@pytest.mark.parametrize("text", ["datasets = 3", 'datasets = ["a"]', "datasets = [{subsets = [1]}]",
                                  "general = 1\ndatasets = [{subsets = [{}]}]"])
def test_a_broken_dataset_config_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not as kohya's scripts have them"):
        imported(tmp_path, text, "dataset.toml")


def test_an_empty_dataset_config(tmp_path: Path) -> None:
    assert set(imported(tmp_path, "datasets = []", "dataset.toml").to_fill_in) == {"base.path", "data.folder"}


@pytest.mark.parametrize(("arguments", "wanted", "needless"), [
    ("--masked_loss --conditioning_data_dir=m --alpha_mask", {"mask": "files", "masks": "m", "mask_floor": 0.0},
     ["alpha_mask"]),
    ("--alpha_mask", {"mask": "alpha", "missing_masks": "whole", "mask_floor": 0.0}, []),
    ("--masked_loss", {}, ["masked_loss"]),
    ("--conditioning_data_dir=m", {}, ["conditioning_data_dir"]),
])
def test_masks(arguments: str, wanted: dict, needless: list[str], tmp_path: Path) -> None:
    found = line(tmp_path, f"--train_data_dir=photos {arguments}")
    keys = became(found)
    assert {key.removeprefix("data."): value for key, value in keys.items() if "mask" in key} == wanted
    assert [key for key in needless if fate(found, key) != "needless"] == []
