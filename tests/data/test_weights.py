"""What each picture's loss weighs: by its set, its own file and its caption; and how a batch's loss comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.data.check import check
from impasto.data.dataset import list_folder
from impasto.data.inventory import take_inventory
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.source import Source, prepare_source
from impasto.objectives.denoise import Denoise, DenoiseOptions
from impasto.training.step import step
from tests.data.fakes import FakeBase, write_picture
from tests.data.sharded import write_shard
from tests.objectives.test_denoise import Stub, batch

CAPTIONS = {"a.png": "a Blurry dog", "b.png": "a sks dog, blurry", "c.png": "a cat"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        write_picture(tmp_path / "photos" / name, key=i, caption=caption)
    return tmp_path / "photos"


def prepare(photos: Path, prior: PriorOptions | None = None, validation: ValidationOptions | None = None,
            **keys: Any) -> Source:
    data = DataOptions(**{"folder": str(photos), "resolution": 64, "bucket_step": 8, **keys})
    return prepare_source(FakeBase.make(), data, prior, trains=frozenset({"unet"}), batch_size=1, accumulation=3,
                          seed=0, device="cpu", validation=validation)


def weights(source: Source) -> dict[str, float]:
    """What each picture weighs in batches."""
    return {name: weight for batches in source.micro_batches(0) for each in batches
            for name, weight in zip(each.names, each.weight.tolist(), strict=True)}


def test_a_pictures_json_says_what_it_weighs_whatever_file_its_caption_is_in(photos: Path) -> None:
    (photos / "a.json").write_text('{"loss_weight": 0.25}', encoding="utf-8")
    (photos / "b.txt").unlink()
    (photos / "b.json").write_text('{"caption": "a dog", "loss_weight": 2}', encoding="utf-8")
    assert weights(prepare(photos)) == pytest.approx({"a.png": 0.25, "b.png": 2, "c.png": 1})
    assert weights(prepare(photos, loss_weight=0.5)) == pytest.approx({"a.png": 0.125, "b.png": 1, "c.png": 0.5})
    assert "pictures with a loss weight of their own, or of their caption: 2, from 0.25 to 2" in \
        prepare(photos).describe()


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "merged.json", "rows.parquet"])
def test_tables_say_it_too(photos: Path, table: str) -> None:
    rows = [{"file_name": name, "text": caption, "loss_weight": 0.5 + i} for i, (name, caption) in
            enumerate(CAPTIONS.items())]
    for name in CAPTIONS:
        (photos / name).with_suffix(".txt").unlink()
    path = photos / table
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        case ".csv":
            path.write_text("file_name,text,loss_weight\n" + "".join(
                f'{row["file_name"]},"{row["text"]}",{row["loss_weight"]}\n' for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps({row.pop("file_name"): row for row in rows}), encoding="utf-8")
        case _:
            arrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert weights(prepare(photos)) == pytest.approx({"a.png": 0.5, "b.png": 1.5, "c.png": 2.5})


def test_a_table_beside_captions_of_their_own_may_hold_weights_alone(photos: Path) -> None:
    (photos / "meta.json").write_text('{"a.png": {"loss_weight": 3}}', encoding="utf-8")
    assert weights(prepare(photos)) == pytest.approx({"a.png": 3, "b.png": 1, "c.png": 1})


def test_the_picture_s_own_file_goes_before_a_table(photos: Path) -> None:
    (photos / "a.json").write_text('{"loss_weight": 0}', encoding="utf-8")
    (photos / "metadata.csv").write_text("file_name,loss_weight\na.png,3\nb.png,4\nc.png,\n", encoding="utf-8")
    assert weights(prepare(photos)) == pytest.approx({"a.png": 0, "b.png": 4, "c.png": 1})


@pytest.mark.parametrize("bad", ["-1", "NaN", "Infinity", '"much"', "true", "[1]", "1e999"])
def test_what_is_no_weight_is_refused_by_name(photos: Path, bad: str) -> None:
    (photos / "a.json").write_text(f'{{"loss_weight": {bad}}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"has a loss_weight that is not a number of 0 or more: a\.png") as error:
        prepare(photos)
    assert str(error.value.where).endswith("a.json") and "\n" not in str(error.value)
    data = DataOptions(folder=str(photos), resolution=64, bucket_step=8)
    (told,) = [each for each in check(take_inventory(list_folder(photos), data, 1)).findings
               if each.kind == "caption file"]
    assert "a.png" in told.names["a.json"]


def test_rows_that_disagree_on_it_are_refused(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": "a.png", "loss_weight": weight})
                                                     for weight in (1, 2)), encoding="utf-8")
    with pytest.raises(UserError, match=r"says different things of one picture: a\.png"):
        prepare(photos)


# --- by captions -------------------------------------------------------------------------------------------


def test_the_first_pattern_in_the_caption_counts(photos: Path) -> None:
    patterns = {r"\bsks\b": 2.0, "blurry": 0.3, "watercolou?r": 5.0}
    source = prepare(photos, caption_loss_weights=patterns, caption_template="blurry {}")
    assert weights(source) == pytest.approx({"a.png": 0.3, "b.png": 2, "c.png": 1})
    assert "caption_loss_weights that are in no caption: 'watercolou?r'" in source.describe()
    (photos / "a.json").write_text('{"loss_weight": 0.5}', encoding="utf-8")
    multiplied = weights(prepare(photos, caption_loss_weights=patterns, loss_weight=2))
    assert multiplied == pytest.approx({"a.png": 0.3, "b.png": 4, "c.png": 2})


def test_class_pictures_and_held_out_ones_are_not_weighed_by_it(photos: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "class" / "d.png", key=9)
    write_picture(tmp_path / "apart" / "e.png", key=10, caption="a dog")
    prior = PriorOptions(folder=str(tmp_path / "class"), caption="a dog", weight=0.7)
    source = prepare(photos, prior, ValidationOptions(folder=str(tmp_path / "apart")),
                     caption_loss_weights={"dog": 0.1}, loss_weight=3)
    assert weights(source)["d.png"] == pytest.approx(0.7)
    assert [item.weight for item in source.held_out] == [1]
    (held_out,) = prepare(photos, None, ValidationOptions(fraction=0.1), caption_loss_weights={"a": 0.1}).held_out
    assert held_out.weight == held_out.own_weight == 1


def test_samples_of_shards_are_weighed_by_their_captions(tmp_path: Path) -> None:
    for i, caption in enumerate(CAPTIONS.values()):
        write_picture(tmp_path / "plain" / f"{i}.png", key=i, caption=caption)
    members = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "plain").iterdir())]
    write_shard(tmp_path / "a.tar", members)
    source = prepare(tmp_path, folder=None, source="shards", shards=[str(tmp_path / "a.tar")],
                     caption_loss_weights={"sks": 2, "blurry": 0.3}, loss_weight=0.5)
    assert {name[-5:]: weight for name, weight in weights(source).items()} == pytest.approx(
        {"0.png": 0.15, "1.png": 1, "2.png": 0.5})


@pytest.mark.parametrize(("table", "line"), [({"(": 1.0}, "is no regular expression"), ({"a": -1}, "greater than or"),
                                             ({"a": float("nan")}, "finite|greater than")])
def test_what_cannot_be_is_said(table: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        DataOptions(folder="x", caption_loss_weights=table)


# --- what comes of it --------------------------------------------------------------------------------------


def test_other_weights_are_another_fingerprint(photos: Path) -> None:
    first = prepare(photos).fingerprint
    (photos / "a.json").write_text('{"loss_weight": 1.0}', encoding="utf-8")
    assert prepare(photos).fingerprint == first
    (photos / "a.json").write_text('{"loss_weight": 0.5}', encoding="utf-8")
    assert prepare(photos).fingerprint != first


def test_a_steps_loss_is_multiplied_by_it() -> None:
    from impasto.core.rng import Draws

    plain, weighed = batch(), batch(weight=torch.tensor([0.0, 0.25, 3.0]))
    objective, draws = Denoise(DenoiseOptions()), Draws(0, 7, plain.samples)
    torch.testing.assert_close(step(Stub(), weighed, objective, draws),  # type: ignore[arg-type]
                               step(Stub(), plain, objective, draws) * weighed.weight)  # type: ignore[arg-type]
