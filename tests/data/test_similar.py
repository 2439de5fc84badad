"""Copies of a picture are found however they were stored, and other pictures are not; against slow references."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from impasto.data import similar
from impasto.data.similar import ALIKE, SIDE, alike, grid_colours, grouped, picture_hash, ranked
from impasto.mini import lessons
from tests.data.photos import distance, encoded, photo


def groups_of(pictures: list[Image.Image]) -> list[list[int]]:
    return alike([picture_hash(p) for p in pictures], [grid_colours(p) for p in pictures])


def again(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality))).convert("RGB")


COPIES = {
    "JPEG at quality 70": lambda image: again(image, 70),
    "JPEG at quality 30": lambda image: again(image, 30),
    "scaled to 70 %": lambda image: image.resize((round(image.width * 0.7), round(image.height * 0.7))),
    "scaled to 30 %": lambda image: image.resize((round(image.width * 0.3), round(image.height * 0.3))),
    "another shape": lambda image: image.resize((image.width, image.height * 3 // 4)),
    "brightened": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darkened": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "a pixel cropped": lambda image: image.crop((2, 2, image.width - 2, image.height - 2)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_whatever_was_done_to_it(kind: str) -> None:
    originals = [photo(i) for i in range(6)]
    copies = [COPIES[kind](original) for original in originals]
    assert groups_of([*originals, *copies]) == [[i, i + 6] for i in range(6)]


def test_different_pictures_are_not_alike() -> None:
    assert groups_of([photo(i, (48, 64)) for i in range(200)]) == []


def test_the_same_object_on_other_backgrounds_is_another_picture() -> None:
    """Their greys may agree to the bit: the colours do not."""
    pictures = [picture for _, picture in lessons.mascot_pictures()]
    hashes = [picture_hash(p) for p in pictures]
    least = min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[i + 1:] if a is not None and b is not None)
    assert least <= ALIKE and groups_of(pictures) == []


def test_plain_pictures_look_like_nothing() -> None:
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("white", "white", "#fefefe")]
    assert [picture_hash(p) for p in plain] == [None] * 3
    assert groups_of(plain) == [] and groups_of([]) == []


def test_the_hash_is_the_signs_of_the_lowest_frequencies() -> None:
    """DCT-II by its definition, summed in plain loops."""
    image = photo(3)
    greys = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    pairs = sorted(((u, v) for u in range(SIDE) for v in range(SIDE) if (u, v) != (0, 0)),
                   key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))[:64]
    bits = ""
    for u, v in pairs:
        waves = np.array([[np.cos(np.pi * (2 * y + 1) * u / 64) * np.cos(np.pi * (2 * x + 1) * v / 64)
                           for x in range(SIDE)] for y in range(SIDE)])
        bits += str(int((greys * waves).sum() > 0))
    value = picture_hash(image)
    assert value == int(bits, 2) and value is not None and value.bit_length() <= 64


def by_hand(hashes: list[int], most: int) -> list[list[int]]:
    """All pairs compared, and joined by repeated search."""
    group = list(range(len(hashes)))
    for i, a in enumerate(hashes):
        for j, b in enumerate(hashes[:i]):
            if bin(a ^ b).count("1") <= most and group[i] != group[j]:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    return [members for g in dict.fromkeys(group) if len(members := [i for i, x in enumerate(group) if x == g]) > 1]


@pytest.mark.parametrize("most", [0, 1, 3, 8, 12])
def test_bands_miss_no_pair(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(most)
    hashes = [int(value) for value in rng.integers(0, 2**64, 300, dtype=np.uint64)]
    for i in range(100):  # near ones, at every distance around the limit
        flips = rng.choice(64, int(rng.integers(0, 2 * most + 2)), replace=False)
        hashes[200 + i] = hashes[i] ^ sum(1 << int(bit) for bit in flips)
    found = alike(hashes, [bytes(range(48))] * 300, most)
    assert found == by_hand(hashes, most) and (most == 0 or len(found) > 20)
    bands = similar._bands
    for count in (10**4, 10**6, 10**8):  # few wide bands, each with flipped bits
        monkeypatch.setattr(similar, "_bands", lambda _, most, count=count: bands(count, most))
        assert most > 8 or alike(hashes, [bytes(range(48))] * 300, most) == found


def test_many_copies_of_one_picture_make_no_square() -> None:
    """5,000 of them would be 12 million pairs."""
    hashes = [0x0123456789ABCDEF ^ (1 << (i % 60)) for i in range(5000)]
    assert alike(hashes, [bytes(range(48))] * 5000) == [list(range(5000))]


def test_a_crowd_of_other_colours_is_apart() -> None:
    """One hash for all, two colours in turn: no pair is missed, and what is one group already is not compared again."""
    colours = np.array([list(range(48)), list(range(48))[::-1]], np.uint8)
    found, whole = grouped(np.full(3000, 77, np.uint64), colours[np.arange(3000) % 2])
    assert whole and (found == np.arange(3000) % 2).all()


def test_no_more_pairs_are_compared_than_allowed() -> None:
    """Those that agree best come first, and it is said."""
    values = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    values[1000:] = values[:1000]
    colours = np.tile(np.arange(48, dtype=np.uint8), (2000, 1))
    found, whole = grouped(values, colours)
    assert whole and (found == np.arange(2000) % 1000).all()
    some, whole = grouped(values, colours, pairs=0)
    assert not whole and (some == np.arange(2000)).all()


def test_the_largest_stands_first_then_the_nearest() -> None:
    hashes, areas = np.array([0b1, 0b111, 0b0, 0b11], np.uint64), np.array([5, 9, 9, 2])
    order, far = ranked(np.array([3, 4, 7, 9]), hashes, areas)
    assert order.tolist() == [1, 3, 0, 2] and far.tolist() == [0, 1, 2, 3]


def test_a_chain_is_one_group() -> None:
    hashes = [(1 << (5 * i)) - 1 for i in range(10)]
    assert alike(hashes, [bytes(range(48))] * 10) == [list(range(10))]
    assert distance(hashes[0], hashes[9]) == 45
