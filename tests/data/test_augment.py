"""Chance in how a picture is shown: what is seen is what the placement says, against Pillow, numpy and by hand."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from impasto.data.augment import Augment, Variant, shifted
from impasto.data.buckets import Placement, bucket_sizes, cut, place
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.source import Source, prepare_source
from tests.data.fakes import FakeBase, noise_picture, smooth, write_picture

SMALL = {"resolution": 64, "bucket_step": 8}


def augment(**keys: Any) -> Augment:
    return Augment.of(DataOptions(folder="x", **keys))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


# --- where -------------------------------------------------------------------------------------------------


@given(size=st.tuples(st.integers(32, 400), st.integers(32, 400)), crop=st.booleans(), zoom=st.floats(0, 1),
       rotate=st.floats(0, 45), number=st.integers(0, 7), square=st.booleans())
def test_the_window_lies_in_the_picture_however_it_is_turned(size, crop, zoom, rotate, number, square) -> None:
    data = DataOptions(folder="x", buckets=not square, random_crop=crop, zoom=zoom, rotate=rotate, **SMALL)
    placement = place(size, data, bucket_sizes(data))
    assert placement is not None
    shown = Augment.of(data).variant(placement, "digest", number)
    found = shown.placement
    (top, left), (height, width), (tall, wide) = found.crop, found.bucket, found.resized
    assert (found.bucket, found.original) == (placement.bucket, size) and abs(shown.angle) <= rotate
    assert 0 <= top <= tall - height and 0 <= left <= wide - width
    cos, sin = math.cos(math.radians(shown.angle)), math.sin(math.radians(shown.angle))
    for x, y in ((-width, -height), (width, -height), (-width, height), (width, height)):
        across = left + width / 2 + cos * x / 2 - sin * y / 2
        down = top + height / 2 + sin * x / 2 + cos * y / 2
        assert -1e-9 <= across <= wide + 1e-9 and -1e-9 <= down <= tall + 1e-9
    assert tall >= placement.resized[0] and wide >= placement.resized[1]
    if not (crop or zoom or rotate):
        assert shown == Variant(placement)


def test_a_turned_window_is_pillows() -> None:
    image = smooth((120, 160))
    placement = Placement((120, 160), (120, 160), (20, 33), (64, 80))
    for angle in (-13.0, 7.0, 30.0):
        found = Variant(placement, angle=angle).show(image)
        turned = image.rotate(angle, Image.Resampling.BICUBIC, center=(33 + 40, 20 + 32))
        expected = pixels(turned.crop((33, 20, 113, 84)))
        assert (found - expected).abs().max() <= 2 / 127.5
        assert Variant(placement, angle=angle).show(image, flip=True).equal(found.flip(-1))
    assert Variant(placement).show(image).equal(cut(image, placement))


def test_no_corner_is_empty() -> None:
    white = Image.new("RGB", (100, 70), "white")
    data = DataOptions(folder="x", rotate=45, random_crop=True, **SMALL)
    placement = place((70, 100), data, bucket_sizes(data))
    assert placement is not None
    for number in range(40):
        assert Augment.of(data).variant(placement, "x", number).show(white).min() > 0.98


def test_the_crop_conditioning_is_where_the_window_is() -> None:
    """A gradient tells where a window begins and how far it reaches: the placement says the same."""
    size = (200, 300)
    image = smooth(size)  # red grows to the right, green downwards
    data = DataOptions(folder="x", buckets=False, random_crop=True, zoom=0.5, **SMALL)
    placement = place(size, data, bucket_sizes(data))
    assert placement is not None
    crops = set()
    for number in range(20):
        shown = Augment.of(data).variant(placement, "x", number)
        (top, left), (tall, wide) = shown.placement.crop, shown.placement.resized
        seen = (shown.show(image) + 1) * 127.5
        assert seen[0, :, 0].mean().item() / 255 * wide == pytest.approx(left, abs=1.5)
        assert seen[1, 0].mean().item() / 255 * tall == pytest.approx(top, abs=1.5)
        mirrored = shown.show(image, flip=True)
        assert mirrored.equal(shown.show(image).flip(-1))
        assert shown.placement.flipped().crop == (top, wide - left - 64)
        crops.add(shown.placement.crop)
    assert len(crops) > 15
    tops = [Augment.of(data).variant(placement, "x", n).placement for n in range(200)]
    where = [p.crop[1] / (p.resized[1] - 64) for p in tops]
    assert 0.4 < sum(where) / 200 < 0.6 and min(where) < 0.1 and max(where) > 0.9


# --- colours -----------------------------------------------------------------------------------------------


def test_colours_are_changed_as_the_formulas_say() -> None:
    """torchvision's ColorJitter: blends with black, with the mean grey, with the grey of each pixel."""
    image = noise_picture(3, (64, 64))
    placement = Placement((64, 64), (64, 64), (0, 0), (64, 64))
    rgb = np.asarray(image).astype(np.float64)
    grey = rgb @ [0.299, 0.587, 0.114]
    for factor in (0.6, 1.3):
        for key, expected in {"brightness": rgb * factor, "contrast": (1 - factor) * grey.mean() + factor * rgb,
                              "saturation": (1 - factor) * grey[..., None] + factor * rgb}.items():
            found = (Variant(placement, **{key: factor}).show(image).permute(1, 2, 0).numpy() + 1) * 127.5
            assert np.abs(found - np.clip(expected, 0, 255)).max() <= 2, key


def test_hues_go_round_the_circle() -> None:
    image = Image.new("RGB", (1, 1), (200, 60, 60))
    for turns in (1 / 3, -1 / 3, 0.5, 0.05):
        hue, saturation, value = colorsys.rgb_to_hsv(200 / 255, 60 / 255, 60 / 255)
        expected = [255 * each for each in colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)]
        assert np.abs(np.asarray(shifted(image, turns))[0, 0] - expected).max() <= 5  # a hue of 8 bits


@given(number=st.integers(0, 50))
def test_factors_stay_within_what_is_asked_for(number: int) -> None:
    shown = augment(brightness=0.2, contrast=0.1, saturation=1, hue=0.05).variant(
        Placement((64, 64), (64, 64), (0, 0), (64, 64)), "x", number)
    assert abs(shown.brightness - 1) <= 0.2 and abs(shown.contrast - 1) <= 0.1 and 0 <= shown.saturation <= 2
    assert abs(shown.hue) <= 0.05 and shown.placement.crop == (0, 0) and shown.angle == 0


# --- runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(10):
        write_picture(tmp_path / "photos" / f"{i}.png", key=i, size=(90, 120), caption=f"caption {i}")
    return tmp_path / "photos"


def prepare(photos: Path, base: FakeBase | None = None, trains: str = "unet", validation: bool = False,
            seed: int = 0, prior: PriorOptions | None = None, **keys: Any) -> Source:
    data = DataOptions(folder=str(photos), **{**SMALL, **keys})
    return prepare_source(base or FakeBase.make(), data, prior, trains=frozenset({trains}), batch_size=2,
                          accumulation=1, seed=seed, device="cpu",
                          validation=ValidationOptions(fraction=0.2) if validation else None)


ALL = {"random_crop": True, "zoom": 0.3, "rotate": 10, "brightness": 0.1, "hue": 0.1, "variants": 3}


def test_each_use_takes_one_of_the_variants_with_its_own_conditioning(photos: Path) -> None:
    source = prepare(photos, flip=True, **ALL)
    uses: dict[str, list[tuple]] = {}
    for step in range(60):
        for batch in source.micro_batches(step)[0]:
            assert batch.moments is not None and batch.geometry is not None
            for row, name in enumerate(batch.names):
                uses.setdefault(name, []).append((batch.moments[row], tuple(batch.geometry.crop[row].tolist())))
    by_hand = FakeBase.make()
    for item in source.pictures[:3]:
        expected = []
        for number in range(3):
            shown = item.variant(number)
            for flip in (False, True):
                placement = shown.placement.flipped() if flip else shown.placement
                moments = by_hand.encode_images(shown.show(item.picture.read(), flip)[None])[0]
                expected.append((moments, placement.crop))
        found = [next(i for i, (moments, crop) in enumerate(expected) if moments.equal(own) and crop == where)
                 for own, where in uses[item.picture.name]]
        assert len(set(found)) >= 4  # of six, in twelve uses


def test_they_are_encoded_once_and_are_the_same_in_every_run(photos: Path) -> None:
    base, again = FakeBase.make(), FakeBase.make()
    one = prepare(photos, base, **ALL)
    assert base.encoded_pictures == 30
    other = prepare(photos, again, seed=5, **ALL)
    assert again.encoded_pictures == 0 and other.pictures[0].latent_keys == one.pictures[0].latent_keys
    prepare(photos, again, **{**ALL, "variants": 4})
    assert again.encoded_pictures == 10  # the fourth alone
    prepare(photos, again)
    assert again.encoded_pictures == 20  # and the pictures as they are


def test_what_the_step_encodes_is_the_same(photos: Path) -> None:
    cached, live = prepare(photos, **ALL), prepare(photos, trains="vae", **ALL)
    for step in range(5):
        for batch, other in zip(cached.micro_batches(step)[0], live.micro_batches(step)[0], strict=True):
            assert batch.names == other.names and other.pixels is not None and batch.moments is not None
            torch.testing.assert_close(FakeBase.make().encode_images(other.pixels), batch.moments)
            assert batch.geometry is not None and other.geometry is not None
            assert batch.geometry.crop.equal(other.geometry.crop)


def test_held_out_pictures_are_shown_as_they_are(photos: Path) -> None:
    source, plain = prepare(photos, validation=True, **ALL), prepare(photos, validation=True)
    assert [item.latent_keys for item in source.held_out] == [item.latent_keys for item in plain.held_out]
    batch = source.validation_batch([0, 1])
    assert batch.geometry is not None
    assert [tuple(crop) for crop in batch.geometry.crop.tolist()] == [item.placement.crop for item in source.held_out]


def test_the_fingerprint_knows_of_it_and_is_as_ever_without(photos: Path) -> None:
    prints = [prepare(photos, **keys).fingerprint for keys in ({}, {"rotate": 5}, {"rotate": 6}, {"hue": 0.1},
                                                               {"hue": 0.1, "variants": 2})]
    assert len(set(prints)) == 5
    assert "each picture is shown in 3 versions, by brightness, hue, random crop, rotate, zoom; kept encoded" in \
        prepare(photos, **ALL).describe()


@pytest.mark.parametrize(("keys", "line"), [
    ({"rotate": 60}, "less than or equal to 45"), ({"zoom": -0.1}, "greater than or equal to 0"),
    ({"hue": 0.7}, "less than or equal to 0.5"), ({"variants": 3}, "variants is of random_crop"),
    ({"variants": 0, "rotate": 1}, "greater than or equal to 1"),
])
def test_what_cannot_be_is_said(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=line):
        DataOptions(folder="x", **keys)
