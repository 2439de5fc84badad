"""Held-out pictures: which ones follows from the seed and from what is in them, and none of them is learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.data.account import account
from impasto.data.buckets import Placement
from impasto.data.dataset import Picture
from impasto.data.heldout import divide
from impasto.data.options import DataOptions, ValidationOptions
from impasto.data.pictures import pictures_of
from impasto.data.source import Item, Source, prepare_source
from tests.data.fakes import FakeBase, write_picture


def item(name: str, digest: str = "") -> Item:
    place = Placement((8, 8), (8, 8), (0, 0), (8, 8))
    return Item(Picture(Path(name), name, digest or f"digest of {name}", (8, 8)), "", place, 1.0)


def names(items: list[Item]) -> set[str]:
    return {each.picture.name for each in items}


def asked_for(**keys: Any) -> ValidationOptions:
    return ValidationOptions.model_validate(keys)


def out_of(count: int, seed: int = 0, **keys: Any) -> tuple[list[Item], list[Item]]:
    return divide([item(f"{i}.png") for i in range(count)], None, asked_for(**keys), seed)[:2]


@pytest.mark.parametrize(("count", "keys", "expected"), [
    (7, {}, 0), (8, {}, 1), (19, {}, 1), (25, {}, 2), (1000, {}, 16), (100, {"fraction": 0}, 0),
    (3, {"fraction": 0.1}, 1), (1000, {"fraction": 0.1}, 100)])
def test_how_many(count: int, keys: dict[str, Any], expected: int) -> None:
    kept, out = out_of(count, **keys)
    assert len(out) == expected and len(kept) == count - expected


def test_the_choice_hangs_on_seed_and_contents_alone() -> None:
    kept, out = out_of(40)
    assert names(out) == names(out_of(40)[1]) != names(out_of(40, seed=1)[1])
    renamed = [replace(each, picture=replace(each.picture, name=f"z{each.picture.name}")) for each in [*out, *kept]]
    assert names(divide(renamed, None, asked_for(), 0)[1]) == {f"z{name}" for name in names(out)}
    more = out_of(41)[1]  # one picture more takes the place of one at most
    assert len(names(more) - names(out)) <= 1


def test_a_picture_at_several_resolutions_is_named_and_counted_once() -> None:
    items = [item(f"{i}.png") for i in range(10)]
    (held,) = divide(items, None, asked_for(), 0)[1]
    large = [replace(each, placement=Placement((16, 16), (16, 16), (0, 0), (16, 16))) for each in items]
    kept, out, lines = divide([*items, *large], None, asked_for(), 0)
    assert (len(kept), len(out)) == (18, 2)
    assert lines == [f"held out to validate with, and not learned from: {held.picture.name}"]
    assert account("held-out pictures", out, [(8, 8), (16, 16)])[0] == "1 held-out picture: 1 at 8x8, 1 at 16x16"
    beside = [item("own.png", held.picture.digest)]
    assert divide([*items, *large], beside, asked_for(folder="own"), 0)[2] == [
        "pictures that are copies of held-out ones, and are not learned from: 1"]


def test_copies_go_with_what_is_held_out() -> None:
    items = [item(f"{i}.png") for i in range(9)]
    (held,) = divide(items, None, asked_for(), 0)[1]
    copy = item("copy.png", held.picture.digest)
    kept, out, lines = divide([*items, copy], None, asked_for(), 0)
    assert names(out) == {held.picture.name, "copy.png"} and len(kept) == 8
    assert "copy.png" in lines[0] and held.picture.name in lines[0]
    assert divide([item(f"{i}.png", "the same") for i in range(9)], None, asked_for(), 0)[1] == []


def test_a_folder_of_their_own_takes_copies_out_of_the_others() -> None:
    items, own = [item("a"), item("b"), item("c")], [item("v", "digest of b")]
    kept, out, lines = divide(items, own, asked_for(folder="v"), 0)
    assert names(kept) == {"a", "c"} and names(out) == {"v"} and "not learned from: 1" in lines[0]
    with pytest.raises(UserError, match="none is left to learn from"):
        divide(items, items, asked_for(folder="v"), 0)


def test_the_drawn_world_holds_out_numbers_beyond() -> None:
    data = DataOptions.model_validate(
        {"source": "world", "pictures": 20, "resolution": 32, "buckets": False})
    found = pictures_of(data, None, asked_for(), 3)
    kept, out = found.learned, found.held_out
    assert [each.picture.name for each in out] == ["drawing 20", "drawing 21"]
    assert kept == pictures_of(data, None, None, 3).learned and out[0].labels


def prepare(folder: Path, validation: ValidationOptions | None, **keys: object) -> Source:
    data = DataOptions.model_validate({"folder": str(folder), "resolution": 64, "bucket_step": 8, **keys})
    return prepare_source(FakeBase.make(), data, None, trains=frozenset({"unet"}), batch_size=2, accumulation=1,
                          seed=0, device="cpu", validation=validation)


def test_a_source_tells_of_them_and_never_trains_on_them(tmp_path: Path) -> None:
    for i in range(9):
        write_picture(tmp_path / f"{i}.png", key=i, caption=f"{{one|two}} {i}")
    source = prepare(tmp_path, asked_for(), flip=True, wildcards=True, caption_dropout=0.5)
    (held,) = source.held_out
    seen = {name for step in range(12) for ((batch,),) in [source.micro_batches(step)] for name in batch.names}
    assert seen == names(list(source.pictures)) and held.picture.name not in seen and len(seen) == 8
    assert any(held.picture.name in line and "held out" in line for line in source.describe())
    batch = source.validation_batch([0, 0])
    expected = FakeBase.make().encode_text([f"one {held.picture.name[0]}"])["states"]
    assert batch.text is not None and all(row.equal(expected[0]) for row in batch.text["states"])
    (entry,) = source.cache.load_all(held.latent_keys)
    assert batch.moments is not None and batch.moments[0].equal(entry["moments"][0])


def test_with_few_pictures_a_run_is_what_it_was(tmp_path: Path) -> None:
    for i in range(7):
        write_picture(tmp_path / f"{i}.png", key=i, caption="x")
    now, before = prepare(tmp_path, asked_for()), prepare(tmp_path, None)
    assert now.fingerprint == before.fingerprint and not now.held_out and now.describe() == before.describe()
