"""A look at a file against Pillow and plain numpy; and that it agrees with what a run makes of the file."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from impasto.core.files import Remembered, digest
from impasto.data import looks
from impasto.data.dataset import decode, list_folder, memory_of, survey
from impasto.data.findings import BLURRED, sharpness
from impasto.data.looks import Look, look_at, look_over, main_colour
from impasto.data.similar import ALIKE
from tests.data.fakes import smooth
from tests.data.photos import OLD, distance, encoded, photo, put
from tests.data.test_dataset import bad_folder


def test_what_a_jpeg_tells(tmp_path: Path) -> None:
    """Reduced while it is decoded, and still with its own size and digest."""
    data = encoded(photo(1).resize((1400, 1050)), "JPEG", quality=90)
    found = look_at(data)
    put(tmp_path / "a.jpg", data)
    assert (found.size, found.digest, found.bytes) == ((1050, 1400), digest(tmp_path / "a.jpg"), len(data))
    assert (found.format, found.mode, found.turned, found.animated, found.clear) == ("JPEG", "RGB", False, False, 0)
    assert found.alpha is False


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_that_a_run_finds(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(2).resize((1100, 600)), format, exif=exif)
    found = look_at(data)
    assert found.size == decode(data).size[::-1] and found.turned == (orientation != 1)


def test_contrast_and_sharpness_are_numpy_s() -> None:
    image = photo(3)
    found = look_at(encoded(image))
    grey = np.asarray(image.convert("L")).astype(np.float64)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = sum(kernel[dy, dx] * grey[dy:dy + grey.shape[0] - 2, dx:dx + grey.shape[1] - 2]
                    for dy in range(3) for dx in range(3))
    assert found.contrast == pytest.approx(grey.var(), abs=0.01)
    assert found.laplacian == pytest.approx(laplacian.var(), rel=1e-4, abs=0.01)


@pytest.mark.parametrize("side", [240, 900])
def test_a_blurred_picture_is_told_from_a_sharp_one_of_any_size_and_contrast(side: int) -> None:
    sharp = photo(4, (side * 3 // 4, side))
    faint = Image.blend(sharp, Image.new("RGB", sharp.size, "grey"), 0.6)
    blurred = sharp.filter(ImageFilter.GaussianBlur(side / 60))
    assert min(sharpness(look_at(encoded(p, "JPEG", quality=90))) for p in (sharp, faint)) > 2 * BLURRED
    assert sharpness(look_at(encoded(blurred, "JPEG", quality=90))) < BLURRED


def test_the_main_colour_and_its_share() -> None:
    pixels = np.full((64, 64, 3), (16, 130, 240), np.uint8)  # at the edge of a cell of colours
    pixels[::2] += np.uint8(3)
    pixels[:, :16] = (255, 0, 0)
    colour, share = main_colour(Image.fromarray(pixels))
    assert share == 0.75 and max(abs(int(colour[i:i + 2], 16) - value)
                                 for i, value in ((1, 16), (3, 130), (5, 240))) <= 3
    assert main_colour(Image.new("RGB", (300, 200), "#10a0b0")) == ("#10a0b0", 1.0)


def test_transparency_is_a_share_of_the_area() -> None:
    pixels = np.zeros((10, 10, 4), np.uint8)
    pixels[:, 2:, 3] = 255
    assert look_at(encoded(Image.fromarray(pixels))).clear == pytest.approx(0.2)
    opaque = pixels.copy()
    opaque[..., 3] = 255
    assert look_at(encoded(Image.fromarray(opaque))).clear == 0


def wide_png(colour: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write. `colour`: PNG's colour type."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(bytes([0, *range({0: 2, 2: 6, 6: 8}[colour] * 8)]) for _ in range(8))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("make", "mode"), [
    (lambda im: encoded(im), "RGB"), (lambda im: encoded(im.convert("P")), "P"),
    (lambda im: encoded(im.convert("L")), "L"), (lambda im: encoded(im.convert("1")), "1"),
    (lambda im: encoded(im.convert("CMYK"), "JPEG"), "CMYK"), (lambda im: encoded(im.convert("CMYK"), "TIFF"), "CMYK"),
    (lambda im: encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "I;16"),
    (lambda im: wide_png(2), "RGB;16"), (lambda im: wide_png(6), "RGBA;16"), (lambda im: encoded(im, "WEBP"), "RGB"),
])
def test_how_it_is_stored(make, mode: str) -> None:
    assert look_at(make(photo(5, (30, 40)))).mode == mode


@pytest.mark.parametrize(("format", "animated"), [("GIF", True), ("WEBP", True), ("PNG", True), ("TIFF", True),
                                                  ("MPO", False)])
def test_more_frames_than_one(format: str, animated: bool) -> None:
    """A camera's MPO holds another view of the same, and is no animation."""
    frames = [photo(i, (40, 50)) for i in range(3)]
    many = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert look_at(many).animated == animated and not look_at(encoded(frames[0], format)).animated
    first, alone = (int(look_at(data).hash, 16) for data in (many, encoded(frames[0], format)))
    assert distance(first, alone) <= ALIKE


def test_a_reduced_jpeg_is_refused_exactly_when_the_whole_one_is() -> None:
    """Cut short, with flipped bits, with a hole: the same words in both cases."""
    image, draw, bad = photo(6).resize((1100, 800)), random.Random(0), 0
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 8}):
        data = encoded(image, "JPEG", quality=80, **options)
        for i in range(15):
            broken = bytearray(data)
            start = draw.randrange(20, len(data))
            if i % 3 == 0:
                del broken[start:]
            elif i % 3 == 1:
                del broken[start:start + draw.randrange(1, 2000)]
            else:
                broken[start] ^= 1 << draw.randrange(8)
            said = []
            for look in (decode, look_at):
                try:
                    look(bytes(broken))
                    said.append("")
                except ValueError as error:
                    said.append(str(error))
            assert said[0] == said[1]
            bad += bool(said[0])
    assert 10 < bad < 45


# --- folders and the memory --------------------------------------------------------------------------------


def test_the_bad_ones_are_those_of_a_run(tmp_path: Path) -> None:
    listing = list_folder(bad_folder(tmp_path))
    found, problems = look_over(listing, Remembered(tmp_path / "a.json"))
    pictures, expected = survey(listing, Remembered(tmp_path / "b.json"))
    assert problems == expected and len(problems) == 7
    assert {name: (look.digest, look.size) for name, look in found.items()} == {
        p.name: (p.digest, p.size) for p in pictures}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        put(tmp_path / "photos" / f"{i}.jpg", encoded(photo(i), "JPEG"))
    put(tmp_path / "photos" / "bad.png", b"not a picture")
    return tmp_path / "photos"


def test_a_second_look_opens_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = list_folder(folder)
    first = look_over(listing, memory_of(folder))
    monkeypatch.setattr(looks, "look_at", lambda data: pytest.fail("looked again"))
    assert look_over(listing, memory_of(folder)) == first and len(first[0]) == 4 and len(first[1]) == 1


def test_a_changed_file_is_looked_at_again_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = list_folder(folder)
    look_over(listing, memory_of(folder))
    put(folder / "2.jpg", encoded(photo(9), "JPEG"))
    os.utime(folder / "2.jpg", (OLD + 60, OLD + 60))
    seen: list[Look] = []
    look = looks.look_at
    monkeypatch.setattr(looks, "look_at", lambda data: seen.append(look(data)) or seen[-1])
    found, _ = look_over(listing, memory_of(folder))
    assert len(seen) == 1 and found["2.jpg"] == seen[0]


def test_another_version_looks_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_over(list_folder(folder), memory_of(folder))
    monkeypatch.setattr(looks, "VERSION", "2")
    monkeypatch.setattr(looks, "look_at", lambda data: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        look_over(list_folder(folder), memory_of(folder))


def test_a_run_need_not_decode_what_was_looked_at_and_the_other_way_round(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one memory: neither forgets what the other put there."""
    from impasto.data import dataset

    listing = list_folder(folder)
    found, _ = look_over(listing, memory_of(folder))
    examine = dataset._examine
    monkeypatch.setattr(dataset, "_examine", lambda path: examine(path) if path.name == "bad.png" else pytest.fail())
    pictures, _ = survey(listing, memory_of(folder))
    assert [(p.digest, p.size) for p in pictures] == [(look.digest, look.size) for look in found.values()]
    monkeypatch.setattr(looks, "look_at", lambda data: pytest.fail("looked again"))
    look_over(listing, memory_of(folder))


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    photo(0).save(tmp_path / "a.png")
    look_over(list_folder(tmp_path), memory := Remembered(tmp_path / "m.json"))
    assert memory.facts == {}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_what_cannot_be_opened_is_named_and_not_remembered(tmp_path: Path) -> None:
    put(tmp_path / "good.png", photo(0))
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    memory = Remembered(tmp_path / "m.json")
    _, problems = look_over(list_folder(tmp_path), memory)
    assert [p.name for p in problems] == ["link.png"] and "No such file" in problems[0].reason
    assert [Path(key).name for key in memory.facts] == ["good.png"]


def test_a_smooth_picture_is_not_sharp() -> None:
    assert sharpness(look_at(encoded(smooth((300, 300))))) < BLURRED


def test_looking_asks_for_no_torch(folder: Path) -> None:
    code = ("import sys; from pathlib import Path; from impasto.data.inventory import *; "
            "from impasto.data.check import *; from impasto.data.options import DataOptions; "
            f"check_all(take_inventories(DataOptions(folder={str(folder)!r}, caption='many words ' * 60), None, 1)); "
            "print(sorted({'torch', 'diffusers'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
