"""Several resolutions: each picture at each that suits it, batches of one shape, and none dropped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.core.errors import UserError
from impasto.data.buckets import all_buckets, bucket_sizes, cuts, place
from impasto.data.check import check_all, shapes
from impasto.data.inventory import take_inventories
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.source import Source, prepare_source
from tests.data.fakes import FakeBase, write_picture

BOTH = {"resolutions": [96, 64], "bucket_step": 8}
#: large enough for both, for the smaller one, for neither, wide
SIZES = [(100, 100), (96, 96), (80, 80), (40, 40), (96, 144)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, size in enumerate(SIZES):
        write_picture(tmp_path / "photos" / f"{i}.png", key=i, size=size, caption=f"caption {i}")
    return tmp_path / "photos"


def prepare(photos: Path, batch_size: int = 2, prior: PriorOptions | None = None,
            validation: ValidationOptions | None = None, **keys: Any) -> Source:
    data = DataOptions(**{"folder": str(photos), **BOTH, **keys})
    return prepare_source(FakeBase.make(), data, prior, trains=frozenset({"unet"}), batch_size=batch_size,
                          accumulation=1, seed=0, device="cpu", validation=validation)


@settings(max_examples=60)
@given(size=st.tuples(st.integers(30, 300), st.integers(30, 300)), buckets=st.booleans(),
       upscale=st.sampled_from(["allow", "never"]))
def test_a_picture_is_cut_as_at_each_resolution_by_itself(size, buckets, upscale) -> None:
    data = DataOptions(folder="x", buckets=buckets, upscale=upscale, **BOTH)
    sized = [(one, bucket_sizes(one)) for one in data.by_resolution]
    assert [one.resolution for one, _ in sized] == [64, 96] and data.resolution == 96
    alone = []
    for side in (64, 96):
        one = DataOptions(folder="x", buckets=buckets, upscale=upscale, bucket_step=8, resolution=side)
        assert bucket_sizes(one) == sized[(64, 96).index(side)][1]
        alone.append(place(size, one, bucket_sizes(one)))
    found = cuts(size, sized)
    assert all(placement in alone for placement in found)
    assert len({placement.bucket for placement in found}) == len(found)
    fitting = [placement for placement in alone if placement is not None and placement.scale <= 1]
    if fitting:
        assert {p.bucket for p in found} == {p.bucket for p in fitting}
    else:
        assert found == [p for p in alone if p is not None][:1]


def test_an_epoch_holds_each_picture_once_at_each_of_its_resolutions(photos: Path) -> None:
    source = prepare(photos, batch_size=1)
    cut_at = {"0.png": [(64, 64), (96, 96)], "1.png": [(64, 64), (96, 96)], "2.png": [(64, 64)], "3.png": [(64, 64)]}
    for item in source.pictures:
        if item.picture.name in cut_at:
            assert item.placement.bucket in cut_at[item.picture.name]
    for epoch in range(2):
        uses = Counter()
        for step in range(source.epoch_steps):
            for batch in source.micro_batches(epoch * source.epoch_steps + step)[0]:
                assert batch.geometry is not None and batch.moments is not None
                height, width = batch.geometry.target[0].tolist()
                assert tuple(batch.moments.shape[-2:]) == (height // 8, width // 8)
                uses[batch.names[0], (height, width)] += 1
        assert set(uses.values()) == {1} and len(uses) == len(source.pictures) == 8
        for name, sizes in cut_at.items():
            assert sorted(size for other, size in uses if other == name) == sizes


def test_batches_are_of_one_shape_and_none_is_dropped(photos: Path) -> None:
    source = prepare(photos, batch_size=3, repeats=2)
    seen = set()
    for step in range(source.epoch_steps):
        batches = source.micro_batches(step)[0]
        assert len(batches) == 1 and len(batches[0].names) == 3
        seen.update(batches[0].names)
    assert seen == {f"{i}.png" for i in range(5)}


def test_what_the_user_is_told(photos: Path) -> None:
    text = "\n".join(prepare(photos).describe())
    assert "5 pictures: 4 at 64x64, 2 at 96x96" in text
    assert "come at fewer resolutions than others, since they are too small for them: 2" in text
    assert "copies" not in text
    (checked,) = check_all(take_inventories(DataOptions(folder=str(photos), **BOTH), None, 1))
    named = {finding.kind: finding.names for finding in checked.findings}
    assert set(named["fewer resolutions"]) == {"2.png", "3.png"} and named["enlarged"] == {"3.png": "1.60 times"}
    assert sum(shapes(checked).buckets.values()) == 8


def test_class_pictures_and_held_out_ones_come_at_each_too(photos: Path) -> None:
    prior = PriorOptions(caption="a dog", folder=str(photos))
    source = prepare(photos, prior=prior, validation=ValidationOptions(fraction=0.4))
    assert len(source.class_pictures) == 8
    assert {item.picture.name for item in source.held_out}.isdisjoint(item.picture.name for item in source.pictures)
    assert len(source.held_out) + len(source.pictures) == 8


def test_the_fingerprint_follows_the_resolutions(photos: Path) -> None:
    one = prepare(photos, resolutions=None, resolution=96)
    assert len({prepare(photos).fingerprint, one.fingerprint, prepare(photos, resolutions=[64, 88]).fingerprint}) == 3
    assert DataOptions(folder="x", **BOTH) == DataOptions(**DataOptions(folder="x", **BOTH).model_dump())


def test_all_buckets_are_those_of_each() -> None:
    data = DataOptions(folder="x", **BOTH)
    assert set(all_buckets(data)) == {size for one in data.by_resolution for size in bucket_sizes(one)}


@pytest.mark.parametrize(("keys", "line"), [
    ({"resolutions": [64]}, "two or more"), ({"resolutions": []}, "two or more"),
    ({"resolutions": [64, 64]}, "all different"), ({"resolutions": [64, 4]}, "greater than or equal to 8"),
    ({"resolutions": [64, 96], "resolution": 64}, "give resolution or resolutions, not both"),
    ({"resolutions": [64, 96], "bucket_max": 80}, "resolution 96 is not between"),
    ({"resolutions": [64, 96], "source": "world", "folder": None}, "the drawn world has one resolution"),
])
def test_what_cannot_be_is_said(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=line):
        DataOptions(**{"folder": "x", "bucket_step": 8, **keys})


def test_sizes_that_the_base_cannot_have_are_an_error(photos: Path) -> None:
    with pytest.raises(UserError, match=r"data\.resolutions: 68 is not a multiple of 8"):
        prepare(photos, resolutions=[68, 96], buckets=False)
