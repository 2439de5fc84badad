"""Captions beside pictures, in every encoding that editors write, and the missing ones by name."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from impasto.data.captions import captions, read_caption
from impasto.data.dataset import list_folder
from impasto.data.options import DataOptions
from tests.data.fakes import write_picture


@pytest.mark.parametrize("data", [
    "ein Föhn, 犬".encode(),
    "ein Föhn, 犬\n".encode("utf-8-sig"),
    "ein\r\nFöhn, 犬\r\n\r\n".encode(),
    "  ein \r Föhn, 犬 ".encode(),
    "ein Föhn, 犬".encode("utf-16"),
    b"\xfe\xff" + "ein Föhn, 犬".encode("utf-16-be"),
])
def test_encodings_and_line_ends(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read_caption(tmp_path / "a.txt") == "ein Föhn, 犬"


def test_beside_the_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", caption="one")
    write_picture(tmp_path / "inner" / "a.jpg", caption="two")
    found, problems = captions(list_folder(tmp_path), DataOptions(folder=str(tmp_path)))
    assert found == {"a.png": "one", "inner/a.jpg": "two"} and not problems


def test_decomposed_names_match_composed_ones(tmp_path: Path) -> None:
    write_picture(tmp_path / unicodedata.normalize("NFC", "Zoë.png"))
    (tmp_path / unicodedata.normalize("NFD", "Zoë.txt")).write_text("zoe")
    found, problems = captions(list_folder(tmp_path), DataOptions(folder=str(tmp_path)))
    assert list(found.values()) == ["zoe"] and not problems


def test_one_for_all(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", caption="not read")
    write_picture(tmp_path / "b.png")
    (tmp_path / "alone.txt").write_text("not read either")
    found, problems = captions(list_folder(tmp_path), DataOptions(folder=str(tmp_path), caption="sks"))
    assert found == {"a.png": "sks", "b.png": "sks"} and not problems


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", caption="one")
    write_picture(tmp_path / "b.png")
    write_picture(tmp_path / "c.png", caption=" \n")
    write_picture(tmp_path / "d.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    (tmp_path / "e.heic").write_bytes(b"x")
    (tmp_path / "e.txt").write_text("of a kind that is not read")
    (tmp_path / "f.txt").write_text("alone")
    listing = list_folder(tmp_path)
    _, problems = captions(listing, DataOptions(folder=str(tmp_path)))
    assert {p.name: p.reason for p in problems} == {
        "b.png": "has no caption (b.txt)",
        "c.png": "its caption c.txt is empty",
        "d.txt": "cannot be read (not UTF-8 at byte 3)",
        "e.txt": "is a caption of a picture that cannot be read here",
        "f.txt": "is a caption without a picture",
    }
    found, problems = captions(listing, DataOptions(folder=str(tmp_path), missing_captions="empty"))
    assert found == {"a.png": "one", "b.png": "", "c.png": ""}
    assert sorted(p.name for p in problems) == ["d.txt", "e.txt", "f.txt"]
