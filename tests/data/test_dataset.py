"""Pictures: found, decoded, upright; and every kind of bad one named."""

from __future__ import annotations

import io
import os
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from impasto.core.errors import UserError
from impasto.core.files import Remembered, digest
from impasto.data import dataset
from impasto.data.dataset import Picture, decode, list_folder, refuse, survey
from tests.data.fakes import noise_picture, smooth, write_picture


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def black_png(width: int, height: int) -> bytes:
    """A true PNG of one bit a pixel, however large: 900 megapixels are 110 kB."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compressobj(1)
    data = b"".join([*(rows.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)), rows.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# --- what is found -----------------------------------------------------------------------------------------


def test_order_is_by_name_inner_folders_included_hidden_ones_not(tmp_path: Path) -> None:
    for name in ["b.png", "a.PNG", "inner/c.png", "Ünï 写真.png", ".hidden.png", "._b.png", ".git/d.png", "a b.png"]:
        write_picture(tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "phone.HEIC").write_bytes(b"x")
    listing = list_folder(tmp_path)
    assert listing.pictures == ["a b.png", "a.PNG", "b.png", "inner/c.png", "Ünï 写真.png"]
    assert listing.captions == ["a.txt"]
    assert listing.unreadable == ["phone.HEIC"]


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: None, "no such folder"),
    (lambda p: p.write_text("x"), "not a folder"),
    (lambda p: p.mkdir(), "no pictures"),
    (lambda p: write_picture(p / "a.png").rename(p / "a.heic"), r"a\.heic"),
])
def test_folders_without_pictures(tmp_path: Path, make, says: str) -> None:
    make(tmp_path / "photos")
    with pytest.raises(UserError, match=says):
        list_folder(tmp_path / "photos")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have Unicode names only")
def test_a_name_that_is_not_unicode_is_told(tmp_path: Path) -> None:
    os.rename(os.fsencode(write_picture(tmp_path / "a.png")), os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"not valid Unicode: 'caf\\udce9\.png'"):
        list_folder(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    write_picture(tmp_path / "elsewhere" / "a.png")
    write_picture(tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "linked.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos" / "circle").symlink_to(tmp_path / "photos")
    assert list_folder(tmp_path / "photos").pictures == ["b.png", "linked.png", "linked/a.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nothing")
    _, problems = survey(list_folder(tmp_path), Remembered(tmp_path / "r.json"))
    assert [p.name for p in problems] == ["a.png"]


# --- what is decoded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow(orientation: int) -> None:
    image = noise_picture(1, (6, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    shown = decode(data)
    assert shown.size == ((10, 6) if orientation < 5 else (6, 10))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected.convert("RGB")))


def test_transparency_shows_the_background() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[:2, :, 3] = 200, 255  # the upper half opaque red
    pixels[2, :, 3] = 51  # a fifth
    shown = np.asarray(decode(encoded(Image.fromarray(pixels)), "#0000ff"))
    assert (shown[0] == [200, 0, 0]).all() and (shown[3] == [0, 0, 255]).all()
    np.testing.assert_allclose(shown[2, 0], [200 / 5, 0, 255 * 4 / 5], atol=1)


def test_a_palette_and_its_transparent_colour() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    assert decode(encoded(image)).getpixel((1, 1)) == (10, 20, 30)
    shown = decode(encoded(image, transparency=0), "white")
    assert shown.getpixel((1, 1)) == (255, 255, 255) and shown.getpixel((0, 0)) == (200, 100, 50)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format in ("PNG", "TIFF"):
        shown = np.asarray(decode(encoded(Image.fromarray(values), format)))
        np.testing.assert_array_equal(shown, np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = smooth((32, 48))
    shown = decode(encoded(image.convert(mode), format))
    assert shown.mode == "RGB" and shown.size == (48, 32)
    if mode in ("CMYK", "YCbCr", "RGBA"):
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(image)).max() < 12


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_several(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((8, 8)) == (255, 0, 0)


# --- what is refused ---------------------------------------------------------------------------------------


def bad_folder(folder: Path) -> Path:
    """Every kind of bad picture, and a good one."""
    write_picture(folder / "good.png")
    (folder / "text.png").write_text("this is a text", encoding="utf-8")
    (folder / "empty.png").write_bytes(b"")
    jpeg = encoded(noise_picture(2, (64, 64)), "JPEG")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    png = encoded(noise_picture(2, (64, 64)))
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "huge.png").write_bytes(black_png(30_000, 30_000))
    (folder / "float.tif").write_bytes(encoded(Image.new("F", (64, 64), 0.5), "TIFF"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    (folder / "flipped.png").write_bytes(flipped)
    return folder


def test_all_bad_pictures_are_told_at_once_by_name(tmp_path: Path) -> None:
    listing = list_folder(bad_folder(tmp_path / "photos"))
    pictures, problems = survey(listing, Remembered(tmp_path / "r.json"))
    assert [p.name for p in pictures] == ["good.png"]
    reasons = {p.name: p.reason for p in problems}
    assert reasons["text.png"] == "is not a picture"
    assert reasons["empty.png"] == "is an empty file"
    assert "truncated" in reasons["cut.jpg"]
    assert "damaged" in reasons["cut.png"] and "damaged" in reasons["flipped.png"]
    assert "178 megapixels" in reasons["huge.png"]
    assert "floating-point" in reasons["float.tif"]
    with pytest.raises(UserError) as caught:
        refuse(problems, listing.folder)
    for name in reasons:
        assert f"\n  {name}: " in str(caught.value)
    assert "good.png" not in str(caught.value)


def test_a_huge_picture_is_not_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another library has switched Pillow's own limit off."""
    assert decode(black_png(300, 200)).getextrema() == ((0, 0),) * 3
    data = black_png(30_000, 30_000)
    assert len(data) < 10**6
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decompressed"))
        with pytest.raises(ValueError, match="178 megapixels"):
            decode(data)


def test_one_bad_picture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("x")
    _, problems = survey(list_folder(tmp_path), Remembered(tmp_path / "r.json"))
    with pytest.raises(UserError) as caught:
        refuse(problems, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'text.png'}: is not a picture; ")


def test_a_picture_that_changes_while_in_use_is_refused(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", key=1)
    picture = Picture(path, "a.png", digest(path), (64, 64))
    assert np.array_equal(np.asarray(picture.read()), np.asarray(noise_picture(1)))
    write_picture(path, key=2)
    with pytest.raises(UserError, match="has changed"):
        picture.read()
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        picture.read()


# --- what is remembered ------------------------------------------------------------------------------------


def test_old_pictures_are_decoded_once_and_changed_ones_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hour_ago = time.time() - 3600
    for name in ("a.png", "b.png"):
        os.utime(write_picture(tmp_path / "photos" / name), (hour_ago, hour_ago))
    looked: list[str] = []
    examine = dataset._examine
    monkeypatch.setattr(dataset, "_examine", lambda path: looked.append(path.name) or examine(path))
    listing, store = list_folder(tmp_path / "photos"), tmp_path / "r.json"

    first, _ = survey(listing, Remembered(store))
    assert sorted(looked) == ["a.png", "b.png"]
    again, _ = survey(listing, Remembered(store))
    assert sorted(looked) == ["a.png", "b.png"] and again == first
    write_picture(tmp_path / "photos" / "b.png", key=5)
    changed, _ = survey(listing, Remembered(store))
    assert looked[2:] == ["b.png"]
    assert changed[0] == first[0] and changed[1].digest == digest(tmp_path / "photos" / "b.png") != first[1].digest


def test_a_fresh_picture_is_not_remembered(tmp_path: Path) -> None:
    """It may change again within the file system's grain of time, at the same size."""
    write_picture(tmp_path / "a.png")
    remembered = Remembered(tmp_path / "r.json")
    survey(list_folder(tmp_path), remembered)
    assert remembered.get(tmp_path / "a.png", "picture") is None
