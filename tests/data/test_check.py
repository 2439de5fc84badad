"""A good folder has nothing to say of it; each defect alone is found, named and given its weight."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from impasto.core.errors import UserError
from impasto.data.buckets import bucket_sizes, place
from impasto.data.check import Checked, check, check_all, plain, shapes, verdict
from impasto.data.dataset import list_folder
from impasto.data.findings import Level
from impasto.data.inventory import take_inventories, take_inventory
from impasto.data.looks import look_at
from impasto.data.options import DataOptions, PriorOptions
from impasto.data.shapes import orientation
from impasto.data.source import prepare_source
from tests.data.fakes import FakeBase
from tests.data.photos import encoded, good_folder, photo, put

#: buckets of 192 pixels, so that small pictures do
SMALL: dict[str, Any] = {"resolution": 192, "bucket_step": 32}


def look(folder: Path, batch: int = 1, near: bool = True, **keys: Any) -> Checked:
    data = DataOptions(**{"folder": str(folder), **SMALL, **keys})
    return check(take_inventory(list_folder(folder), data, batch), near=near)


def kinds(checked: Checked) -> dict[str, Level]:
    return {finding.kind: finding.level for finding in checked.findings}


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_folder(tmp_path_factory.mktemp("good"), 4, (192, 192))


@pytest.fixture
def folder(tmp_path: Path, pattern: Path) -> Path:
    """A good folder of four pictures."""
    for path in pattern.iterdir():
        put(tmp_path / "photos" / path.name, path.read_bytes())
    return tmp_path / "photos"


def test_of_a_good_folder_there_is_nothing_to_say(folder: Path) -> None:
    found = look(folder, batch=4)
    assert found.findings == [] and found.fit and found.groups == [] and found.tags is None
    assert found.used == found.inventory.listing.pictures and len(found.used) == 4
    assert verdict([found]).line == "fit to train: 4 pictures, and nothing to warn of"
    assert verdict([found]).advice == []


# --- each defect alone -------------------------------------------------------------------------------------


def _dots() -> Image.Image:
    """A white picture with a little in it."""
    image = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(image).rectangle((90, 90, 110, 120), fill="black")
    return image


def _rgba() -> Image.Image:
    pixels = np.array(photo(50, (200, 200)).convert("RGBA"))
    pixels[:100, :, 3] = 0
    return Image.fromarray(pixels)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(51, (200, 200)), "JPEG", exif=exif)


NEW = {"new.png": lambda: photo(60, (200, 200))}
#: kind -> its level, files to add, the caption of the new picture, options
DEFECTS: dict[str, tuple[Level, dict[str, Callable[[], Any]], str | None, dict[str, Any]]] = {
    "unreadable": (Level.REFUSED, {"new.png": lambda: b"<html>"}, "x", {}),
    "too small": (Level.REFUSED, {"new.png": lambda: photo(60, (40, 40))}, "x", {}),
    "no caption": (Level.REFUSED, NEW, None, {}),
    "caption file": (Level.REFUSED, {"alone.txt": lambda: b"alone"}, None, {}),
    "copies": (Level.WARNING, {"new.jpg": lambda: encoded(photo(0, (192, 192)), "JPEG")}, "x", {}),
    "near-duplicates": (Level.WARNING, {"new.jpg": lambda: encoded(photo(0, (192, 192)), "JPEG", quality=60)}, "x", {}),
    "cropped": (Level.WARNING, {"new.png": lambda: photo(60, (192, 1300))}, "x", {}),
    "enlarged": (Level.WARNING, {"new.png": lambda: photo(60, (100, 100))}, "x", {}),
    "thin buckets": (Level.WARNING, {"new.png": lambda: photo(60, (384, 96))}, "x", {"batch": 2}),
    "empty captions": (Level.WARNING, NEW, None, {"missing_captions": "empty"}),
    "unread captions": (Level.WARNING, {}, None, {"caption": "one for all"}),
    "caption mojibake": (Level.WARNING, NEW, "cafÃ©", {}),
    "caption control": (Level.WARNING, NEW, "a\x07dog", {}),
    "caption cut": (Level.WARNING, NEW, "a dog on top of the", {}),
    "caption comma": (Level.NOTE, NEW, "a dog, ", {}),
    "caption entity": (Level.NOTE, NEW, "cats &amp; dogs", {}),
    "caption weight": (Level.NOTE, NEW, "a (good:1.2) dog", {}),
    "caption bracket": (Level.NOTE, NEW, "dog \\(animal\\)", {}),
    "caption files": (Level.NOTE, {**NEW, "new.txt": lambda: "a dog".encode("utf-8-sig")}, None, {}),
    "long captions": (Level.NOTE, NEW, "a very good dog " * 30, {}),
    "other kinds": (Level.WARNING, {"new.heic": lambda: b"x"}, None, {}),
    "transparent": (Level.NOTE, {"new.png": _rgba}, "x", {}),
    "converted": (Level.NOTE, {"new.jpg": lambda: encoded(photo(60, (200, 200)).convert("CMYK"), "JPEG")}, "x", {}),
    "turned": (Level.NOTE, {"new.jpg": _turned}, "x", {}),
    "animated": (Level.NOTE, {"new.webp": lambda: encoded(
        photo(60, (200, 200)), "WEBP", save_all=True, append_images=[photo(61, (200, 200))])}, "x", {}),
    "one colour": (Level.NOTE, {"new.png": _dots}, "x", {}),
    "blurred": (Level.NOTE, {"new.png": lambda: photo(60, (200, 200)).filter(ImageFilter.GaussianBlur(6))}, "x", {}),
    "mixed shapes": (Level.NOTE, {"new.png": lambda: photo(60, (200, 230))}, "x", {"buckets": False}),
    "own bucket": (Level.NOTE, {"new.png": lambda: photo(60, (100, 100))}, "x", {"upscale": "never"}),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_alone_is_the_only_thing_found(kind: str, folder: Path) -> None:
    level, files, caption, options = DEFECTS[kind]
    for name, make in files.items():
        put(folder / name, make())
    if caption is not None:
        (folder / "new.txt").write_text(caption, encoding="utf-8")
    found = look(folder, **options)
    assert kinds(found) == {kind: level}
    finding = found.findings[0]
    assert found.fit == (level is not Level.REFUSED)
    assert finding.what[0].isdigit() and (finding.fix or level is Level.NOTE or kind == "caption control")
    names = [name for name in finding.names if name.startswith(("new", "alone"))]
    if kind not in ("unread captions", "thin buckets", "mixed shapes"):
        assert names == [list(finding.names)[-1]] and len(finding.names) == 1
    new = next((name for name in found.inventory.listing.pictures if name.startswith("new")), None)
    if new is not None:
        assert (new in found.used) == found.fit


def test_captions_for_all_are_looked_at_once(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    found = look(folder, caption="a (very:1.4) long caption, " * 20)
    assert {f.kind: list(f.names) for f in found.findings} == {
        kind: ["data.caption"] for kind in ("caption weight", "long captions", "caption comma")}


def test_a_caption_on_many_pictures(folder: Path) -> None:
    for name in ("000", "001", "002"):
        (folder / f"{name}.txt").write_text("sks dog")
    shared = look(folder).findings
    assert [(f.kind, list(f.names)) for f in shared] == [("shared captions", ["000.jpg", "001.jpg", "002.jpg"])]


def test_all_captions_missing_is_told_with_the_other_way_out(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    found = look(folder)
    assert kinds(found) == {"no caption": Level.REFUSED} and "data.caption" in found.findings[0].fix
    assert found.used == []


def test_exact_copies_with_other_captions_say_so(folder: Path) -> None:
    put(folder / "copy.jpg", (folder / "000.jpg").read_bytes(), "something else")
    (group,), (finding,) = look(folder).groups, look(folder).findings
    assert group.exact and group.names == ["000.jpg", "copy.jpg"]
    assert finding.names == {"copy.jpg": "of 000.jpg, with another caption"}


def test_of_near_copies_the_largest_stands_first_and_distances_are_told(folder: Path) -> None:
    put(folder / "large.png", photo(0, (192, 192)).resize((400, 400)), "large")
    put(folder / "copy.jpg", (folder / "000.jpg").read_bytes(), "picture 0 of the folder")
    found = look(folder)
    near = next(group for group in found.groups if not group.exact)
    assert near.names == ["large.png", "000.jpg"] and near.distances[0] == 0
    hashes = [int(look_at((folder / name).read_bytes()).hash, 16) for name in near.names]
    assert near.distances[1] == bin(hashes[0] ^ hashes[1]).count("1")
    assert kinds(look(folder, near=False)) == {"copies": Level.WARNING}


def test_tags_are_counted_where_captions_are_tags(folder: Path) -> None:
    for i, path in enumerate(sorted(folder.glob("*.txt"))):
        path.write_text(f"dog, grass, number {i}, {'Blue sky' if i else 'blue_sky'}, dog")
    found = look(folder)
    assert found.tags is not None and found.tags.counts["dog"] == 4 and len(found.tags.once) == 5
    assert kinds(found) == {"caption twice": Level.NOTE, "tag spellings": Level.NOTE}
    assert look(folder, caption="a dog").tags is None


# --- the whole -----------------------------------------------------------------------------------------------


def test_three_in_a_hundred_broken_are_all_told_at_once(tmp_path: Path) -> None:
    """And nothing that a run would refuse is missed: its own refusal names the same files."""
    broken = {f"{i:03}.jpg" for i in range(7, 300, 33)}
    for i in range(300):
        data = encoded(photo(i, (48, 48)), "JPEG")
        name = f"{i:03}.jpg"
        put(tmp_path / "photos" / name, data[:len(data) * 2 // 3] if name in broken else data, f"picture {i}")
    found = look(tmp_path / "photos", resolution=48, bucket_step=16)
    assert kinds(found) == {"unreadable": Level.REFUSED}
    assert set(found.findings[0].names) == broken == set(found.unused) and len(broken) == 9
    assert verdict([found]).line == "not fit to train yet: a run would refuse 9 pictures"
    with pytest.raises(UserError) as refused:
        prepare_source(FakeBase.make(), DataOptions(folder=str(tmp_path / "photos"), resolution=48, bucket_step=16),
                       None, trains=frozenset({"unet"}), batch_size=1, accumulation=1, seed=0, device="cpu")
    for name, reason in found.findings[0].names.items():
        assert f"{name}: {reason}" in str(refused.value)


def test_what_is_refused_is_what_a_run_refuses(folder: Path) -> None:
    """Every kind of refusal at once, word for word."""
    for level, files, caption, _ in DEFECTS.values():
        if level is Level.REFUSED:
            for i, (name, make) in enumerate(files.items()):
                stem = f"{len(list(folder.iterdir()))}{i}"
                put(folder / f"{stem}{Path(name).suffix}", make(), caption)
    found = look(folder)
    assert not found.fit
    with pytest.raises(UserError) as refused:
        prepare_source(FakeBase.make(), DataOptions(folder=str(folder), **SMALL), None, trains=frozenset({"unet"}),
                       batch_size=1, accumulation=1, seed=0, device="cpu")
    told = [f"\n  {name}: {reason}" for finding in found.findings if finding.level is Level.REFUSED
            for name, reason in finding.names.items()]
    assert len(told) == 4 == str(refused.value).count("\n") and all(line in str(refused.value) for line in told)


def test_numbers_agree_with_the_cuts_themselves(tmp_path: Path) -> None:
    sizes = [(192, 192), (150, 250), (250, 150), (400, 380), (96, 96), (500, 700)]
    for i, size in enumerate(sizes):
        put(tmp_path / f"{i}.png", photo(i, size), f"picture {i}")
    found = shapes(look(tmp_path))
    data = DataOptions(folder="x", **SMALL)
    placed = [p for size in sizes if (p := place(size, data, bucket_sizes(data)))]
    assert sum(found.buckets.values()) == len(sizes) == sum(found.ratios.values()) == sum(found.sides.values())
    assert found.cropped_mean == pytest.approx(np.mean([p.cropped for p in placed]))
    assert found.cropped_most is not None and found.cropped_most[0] == max(p.cropped for p in placed)
    assert found.enlarged == sum(p.scale > 1 for p in placed) and found.enlarged_most == (2.0, "4.png")
    assert (found.smallest, found.largest) == ((96, 96), (500, 700))
    assert found.orientations == {"square": 3, "landscape": 2, "portrait": 1}
    assert found.sides == {"under 128": 1, "128 to 255": 3, "256 to 511": 2}


@pytest.mark.parametrize(("size", "shape"), [((10, 10), "square"), ((100, 104), "square"), ((100, 107), "landscape"),
                                             ((107, 100), "portrait"), ((1, 5000), "landscape")])
def test_shapes_in_words(size: tuple[int, int], shape: str) -> None:
    assert orientation(size) == shape


def test_a_plain_account_is_json_and_complete(folder: Path) -> None:
    put(folder / "bad.png", b"no", "x")
    found = look(folder)
    told = json.loads(json.dumps(plain(found)))
    assert list(told["files"]) == found.inventory.listing.pictures and told["pictures"] == 5 and told["used"] == 4
    assert told["files"]["bad.png"] == {"used": False, "why_not": ["is not a picture"], "caption": "x", "chunks": 1}
    one = told["files"]["000.jpg"]
    assert (one["used"], one["bucket"], one["scale"]) == (True, [192, 192], 1)
    assert one["caption"] == "picture 0 of the folder"
    assert {"digest", "height", "width", "bytes", "format", "mode", "hash", "sharpness", "crop", "cropped"} <= set(one)


# --- [prior] -------------------------------------------------------------------------------------------------


def test_both_folders_are_looked_at_and_held_against_each_other(folder: Path, tmp_path: Path) -> None:
    for i in (1, 20, 21):
        put(tmp_path / "class" / f"c{i}.jpg", encoded(photo(i, (192, 192)), "JPEG"))
    put(tmp_path / "class" / "torn.jpg", b"")
    data = DataOptions(folder=str(folder), **SMALL)
    prior = PriorOptions(folder=str(tmp_path / "class"), caption="a dog")
    checked = check_all(take_inventories(data, prior, 1))
    assert [c.inventory.title for c in checked] == ["pictures", "class pictures"]
    assert checked[0].findings == [] and list(kinds(checked[1])) == ["unreadable", "in both"]
    assert checked[1].findings[1].names == {"c1.jpg": "is 001.jpg"}
    assert not verdict(checked).fit and "1 picture" in verdict(checked).line
    drawn = PriorOptions(caption="a dog")  # drawn with the base: there is nothing to look at yet
    assert len(take_inventories(data, drawn, 1)) == 1


@pytest.mark.parametrize(("keys", "says"), [
    ({"folder": "nowhere"}, "no such folder"), ({"bucket_step": 36}, "multiple of 8"),
    ({"buckets": False, "resolution": 500}, "multiple of 8"),
])
def test_what_no_run_begins_with_is_an_error(folder: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        take_inventories(DataOptions(**{"folder": str(folder), **SMALL, **keys}), None, 1)


# --- many ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_thousand_pictures_and_a_second_time(tmp_path: Path) -> None:
    """10,000 are to take minutes at first, mostly decoding, and seconds from then on."""
    for i in range(2000):
        picture = photo(i % 400, (96, 128)).rotate(i / 100)
        put(tmp_path / "photos" / f"{i // 500}" / f"{i}.jpg", encoded(picture, "JPEG"),
            f"picture {i} of many, with a caption that is long enough for the tokenizer to be asked about it")
    photo.cache_clear()
    started = time.monotonic()
    first = look(tmp_path / "photos", resolution=96, bucket_step=32)
    middle = time.monotonic()
    second = look(tmp_path / "photos", resolution=96, bucket_step=32)
    ended = time.monotonic()
    assert plain(first) == plain(second) and len(first.used) == 2000 and first.groups
    assert middle - started < 120 and ended - middle < 20
