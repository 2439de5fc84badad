"""The page of a folder: well-formed whatever its files are called, and its crops are those of the model."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from impasto.core.errors import UserError
from impasto.data.buckets import bucket_sizes, cut, place
from impasto.data.check import Checked, Verdict, check_all, verdict
from impasto.data.dataset import decode
from impasto.data.findings import Level
from impasto.data.inventory import take_inventories
from impasto.data.options import DataOptions, PriorOptions
from impasto.evaluation import dataset_page, dataset_parts
from impasto.evaluation.dataset_page import draw_crops, page, write_page
from impasto.evaluation.dataset_parts import Part, folder_part
from tests.data.photos import encoded, good_folder, photo, put
from tests.evaluation.test_report import HOSTILE, Reader

#: a name that a file may have, with as much of HTML as it can hold
NAME = "& ' x.png" if os.name == "nt" else "<script>alert(1)<!script> & \"x\" ' <title>.png"


def look(folder: Path, prior: Path | None = None, **keys: Any) -> list[Checked]:
    data = DataOptions(**{"folder": str(folder), "resolution": 96, "bucket_step": 32, **keys})
    return check_all(take_inventories(data, prior and PriorOptions(folder=str(prior), caption="a dog"), 2))


def parts(checked: list[Checked]) -> tuple[list[Part], Verdict]:
    return [folder_part(each) for each in checked], verdict(checked)


def shown(checked: list[Checked]) -> Reader:
    return Reader(page(*parts(checked)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something for each part of the page."""
    good_folder(tmp_path / "photos", 5, (96, 128))
    put(tmp_path / "photos" / "wide.png", photo(9, (90, 300)), "dog, grass, sky, dog")
    put(tmp_path / "photos" / "copy.jpg", (tmp_path / "photos" / "001.jpg").read_bytes(), "the same, of a dog")
    put(tmp_path / "photos" / "near.jpg", encoded(photo(2, (96, 128)), "JPEG", quality=60), "nearly the same")
    put(tmp_path / "photos" / "torn.jpg", encoded(photo(3), "JPEG")[:400], "torn")
    put(tmp_path / "photos" / "small.png", photo(4, (10, 10)), "small")
    put(tmp_path / "photos" / NAME, photo(10, (96, 96)), HOSTILE)
    return tmp_path / "photos"


def test_a_page_of_everything_is_well_formed_and_runs_nothing(folder: Path) -> None:
    read = shown(look(folder))
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) == 5 and max(levels) == 3
    assert not re.search(r"\$\w", read.text)
    for tag, attributes in read.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value is not None and value.startswith("data:")
    without = re.sub(r"base64,[\w+/=]+", "", page(*parts(look(folder))))
    assert not re.search(r"https?:|//|@import|url\(", without, re.IGNORECASE)


def test_names_and_captions_are_only_text(folder: Path) -> None:
    checked = look(folder)
    written = page(*parts(checked))
    read = Reader(written)
    assert "<script" not in written and read.text.count(NAME) >= 1 and HOSTILE in read.text
    assert NAME in [image["alt"] for image in read.all("img")]
    (folder / NAME).rename(folder / "plain.png")
    (folder / NAME).with_suffix(".txt").rename(folder / "plain.txt")
    (folder / "plain.txt").write_text("a plain caption")
    plain = shown(look(folder))
    assert sorted(tag for tag, _ in read.elements) == sorted(tag for tag, _ in plain.elements)


def test_the_verdict_stands_at_the_top_and_problems_first(folder: Path) -> None:
    checked = look(folder)
    read = shown(checked)
    assert "Not fit to train yet" in read.text and "A run would refuse 2 pictures" in read.text
    order = folder_part(checked[0]).chosen
    assert order[:2] == ["small.png", "torn.jpg"] and sorted(order) == sorted(checked[0].inventory.listing.pictures)
    said = folder_part(checked[0]).marks
    levels = [said[name][0][0] if name in said else Level.NOTE for name in order]
    assert levels == sorted(levels, key=list(Level).index)
    cards = [attributes["class"] for tag, attributes in read.elements if attributes.get("class") == "card"]
    assert len(cards) == len(order) and read.text.count("cannot be shown") == 1
    assert "is too small" in read.text and "of 001.jpg, with another caption" in read.text


def test_crops_are_what_the_model_sees(tmp_path: Path) -> None:
    """`cut`'s own pixels made small, for pictures scaled down, up, turned by EXIF and reduced while decoding."""
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "large.jpg", encoded(photo(1, (900, 1500)), "JPEG", quality=95), "a")
    put(tmp_path / "turned.jpg", encoded(photo(2, (700, 1400)), "JPEG", quality=95, exif=exif), "a")
    put(tmp_path / "wide.png", photo(3, (200, 900)), "a")
    put(tmp_path / "tiny.png", photo(4, (150, 130)), "a")
    for buckets in (True, False):
        data = DataOptions(folder=str(tmp_path), resolution=384, buckets=buckets, bucket_step=64)
        checked = look(tmp_path, resolution=384, buckets=buckets, bucket_step=64)
        crops = draw_crops(folder_part(checked[0]), checked[0].used)
        assert len(crops) == 4
        for name, crop in crops.items():
            image = decode((tmp_path / name).read_bytes())
            placement = place((image.height, image.width), data, bucket_sizes(data))
            assert placement is not None and max(crop.size) == dataset_page.SIDE
            assert abs(crop.width / crop.height - placement.bucket[1] / placement.bucket[0]) < 0.02
            seen = ((cut(image, placement).permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
            expected = np.asarray(Image.fromarray(seen).resize(crop.size, Image.Resampling.LANCZOS)).astype(float)
            off = np.abs(np.asarray(crop).astype(float) - expected)
            assert off.mean() < 4, (name, buckets)
            moved = np.abs(np.asarray(crop).astype(float)[:, 3:] - expected[:, :-3])
            assert off.mean() < moved.mean() / 2  # three pixels aside it would not agree


def test_pictures_on_the_page_come_back(folder: Path) -> None:
    checked = look(folder)
    crop = draw_crops(folder_part(checked[0]), ["000.jpg"])["000.jpg"]
    image = next(image for image in shown(checked).all("img") if image["alt"] == "000.jpg")
    back = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1], validate=True)))
    assert back.size == crop.size == (int(str(image["width"])), int(str(image["height"])))
    assert np.abs(np.asarray(back.convert("RGB"), float) - np.asarray(crop, float)).mean() < 10


def test_transparent_pictures_stand_on_their_background(tmp_path: Path) -> None:
    put(tmp_path / "a.png", Image.new("RGBA", (96, 96), (0, 0, 0, 0)), "a")
    crop = draw_crops(folder_part(look(tmp_path, background="#204060")[0]), ["a.png"])["a.png"]
    assert crop.getpixel((50, 50)) == (0x20, 0x40, 0x60)


def test_of_many_pictures_some_are_shown_and_it_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_parts, "MOST", 6)
    checked = look(folder)
    chosen = {most: folder_part(checked[0], most).chosen for most in (1, 4, 6)}
    assert len(chosen[6]) == 6 and {"small.png", "torn.jpg"} <= set(chosen[6])
    assert chosen[1] == ["small.png"] and chosen[4][-1] == NAME  # a good one, too
    read = shown(checked)
    assert "6 of 11 are shown" in read.text
    assert sum(attributes.get("class") == "card" for _, attributes in read.elements) == 6


def test_of_many_copies_some_are_shown(tmp_path: Path) -> None:
    for i in range(12):
        put(tmp_path / f"{i}.png", photo(1, (96, 96)), f"copy {i}")
    read = shown(look(tmp_path))
    assert "and 4 more" in read.text and sum(attributes.get("class") == "pane" for _, attributes in read.elements) == 20


def test_two_folders_have_their_own_sections(folder: Path, tmp_path: Path) -> None:
    good_folder(tmp_path / "class", 3, (96, 96))
    read = shown(look(folder, tmp_path / "class"))
    assert "Pictures: What was found" in read.text and "Class pictures: As the model will see them" in read.text


def test_tags_are_drawn(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"{i}.png", photo(i, (96, 96)), f"dog, grass, sky, <b>{i}</b>")
    read = shown(look(tmp_path))
    assert "The most frequent of 7 tags in 4 captions" in read.text and "<b>3</b>" in read.text


def test_a_folder_with_nothing_that_can_be_read(tmp_path: Path) -> None:
    put(tmp_path / "a.png", b"")
    read = shown(look(tmp_path, caption="a"))
    assert "Not fit to train yet" in read.text and "is an empty file" in read.text


def test_a_picture_that_has_gone_since_is_no_error(folder: Path) -> None:
    checked = look(folder)
    (folder / "000.jpg").unlink()
    (folder / "001.jpg").write_bytes(b"changed")
    assert shown(checked).text.count("cannot be shown") >= 3


def test_it_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    checked = look(folder)
    path = write_page(*parts(checked), tmp_path / "a" / "page.html")
    assert path.read_text(encoding="utf-8") == page(*parts(checked))
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="page.html"):
        write_page(*parts(checked), tmp_path / "file" / "page.html")


def test_the_look_is_the_report_s(folder: Path) -> None:
    written = page(*parts(look(folder)))
    for name in ("--paper", "prefers-color-scheme: dark", ".figures .value"):
        assert name in written


def test_a_hundred_pictures_stay_small(tmp_path: Path) -> None:
    for i in range(100):
        put(tmp_path / f"{i}.jpg", encoded(photo(i, (96, 96)), "JPEG"), f"picture {i}")
    checked = look(tmp_path)
    assert len(page(*parts(checked))) < 2_500_000
