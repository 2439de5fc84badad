"""Buckets against brute force, and the geometry against Pillow's own resize and crop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from impasto.data.buckets import MOST_ENLARGED, bucket_sizes, cropped_fraction, cut, place
from impasto.data.options import DataOptions
from tests.data.fakes import smooth


def options(**keys) -> DataOptions:
    return DataOptions(folder="photos", **keys)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64), (64, 8), (500, 64), (64, 64)])
def test_buckets_are_the_largest_of_their_kind(resolution: int, step: int) -> None:
    """Brute force: within the bounds and the area, and no larger in one side without leaving them."""
    data = options(resolution=resolution, bucket_step=step)
    sides = [s for s in range(step, 3 * resolution, step) if data.shortest <= s <= data.longest]
    allowed = {(h, w) for h in sides for w in sides if h * w <= resolution**2}
    maximal = {(h, w) for h, w in allowed if (h + step, w) not in allowed or (h, w + step) not in allowed}
    found = bucket_sizes(data)
    assert set(found) <= allowed and found == sorted(found)
    assert {(w, h) for h, w in found} == set(found)
    for height, width in found:
        assert (height, width) in maximal or height == width
    for side in sides:  # each side has its longest partner
        partners = [w for h, w in allowed if h == side]
        if partners:
            assert (side, max(partners)) in found


def test_the_field_s_square_comes_first() -> None:
    assert (512, 512) in bucket_sizes(options()) and (1024, 1024) in bucket_sizes(options(resolution=1024))
    assert bucket_sizes(options(resolution=64)) == [(64, 64)]
    assert bucket_sizes(options(buckets=False, resolution=384)) == [(384, 384)]


def loss_by_hand(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), upscale=st.sampled_from(["allow", "never"]),
       step=st.sampled_from([8, 64]))
def test_the_chosen_bucket_crops_least(height: int, width: int, upscale: str, step: int) -> None:
    data = options(upscale=upscale, bucket_step=step)
    placement = place((height, width), data, bucket_sizes(data))
    buckets = bucket_sizes(data)
    if upscale == "never":
        buckets = [b for b in buckets if b[0] <= height and b[1] <= width]
    if placement is None:
        if upscale == "never":
            assert not buckets and min(height, width) < step
        else:
            assert min(max(b[0] / height, b[1] / width) for b in buckets) > 1
        return
    assert placement.scale <= (1 if upscale == "never" else MOST_ENLARGED)
    if buckets:
        best = min(loss_by_hand((height, width), b) for b in buckets)
        assert placement.bucket in buckets
        assert placement.cropped == pytest.approx(best, abs=1e-9)
    else:  # its own bucket: as large as it gets
        assert placement.bucket[0] * placement.bucket[1] <= 512**2
        assert all(b % step == 0 and s >= b for b, s in zip(placement.bucket, (height, width), strict=True))
    (top, left), (h, w) = placement.crop, placement.bucket
    assert top >= 0 and left >= 0 and top + h <= placement.resized[0] and left + w <= placement.resized[1]
    assert min(placement.resized[0] - h, placement.resized[1] - w) <= 1  # one side fits


def test_too_small_pictures_have_no_place() -> None:
    assert place((1, 1), options(), bucket_sizes(options())) is None
    assert place((127, 127), options(), bucket_sizes(options())) is None
    assert place((128, 128), options(), bucket_sizes(options())).scale == 4
    never = options(upscale="never")
    assert place((63, 200), never, bucket_sizes(never)) is None
    assert place((200, 300), never, bucket_sizes(never)).bucket == (192, 256)
    square = options(upscale="never", buckets=False)
    assert place((200, 300), square, bucket_sizes(square)).bucket == (192, 192)


@pytest.mark.parametrize("size", [(600, 900), (900, 600), (512, 512), (313, 741)])
@pytest.mark.parametrize("buckets", [True, False])
def test_cut_is_a_lanczos_resize_and_a_centre_crop(size: tuple[int, int], buckets: bool) -> None:
    data = options(buckets=buckets)
    image, placement = smooth(size), place(size, data, bucket_sizes(data))
    pixels = cut(image, placement)
    height, width = placement.bucket
    scale = max(height / size[0], width / size[1])
    resized = image.resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.LANCZOS)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    expected = np.asarray(resized).astype(np.float32)[top:top + height, left:left + width] / 127.5 - 1
    assert pixels.shape == (3, height, width) and pixels.abs().max() <= 1
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert placement.original == size and placement.cropped == pytest.approx(cropped_fraction(size, (height, width)))


def test_a_flip_mirrors_pixels_and_keeps_the_geometry_true() -> None:
    size = (512, 771)
    data = options(buckets=False)
    placement = place(size, data, bucket_sizes(data))
    image = smooth(size)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert placement.crop == (0, 129) and placement.flipped().crop == (0, 130)
    flipped = cut(image, placement, flip=True)
    assert flipped.equal(cut(image, placement).flip(-1))
    assert flipped.equal(cut(mirrored, placement.flipped()))


@pytest.mark.parametrize(("keys", "says"), [
    ({"resolution": 32}, "bucket_step 64 is larger"),
    ({"bucket_min": 600}, "bucket_min 600"),
    ({"bucket_max": 400}, "bucket_max 400"),
    ({"background": "blurple"}, "blurple"),
    ({"folders": "x"}, "folders"),
    ({"resolution": [512, 768]}, "resolution"),
])
def test_options_out_of_range(keys: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        options(**keys)
