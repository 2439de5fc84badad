"""Captions beside pictures, in every encoding that editors write, and the missing ones by name."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from impasto.data.caption_files import read_lines
from impasto.data.captions import Captions, read_captions
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
    assert " ".join(read_lines(tmp_path / "a.txt")) == "ein Föhn, 犬"


def test_beside_the_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", caption="one")
    write_picture(tmp_path / "inner" / "a.jpg", caption="two")
    everything = read_captions(list_folder(tmp_path), DataOptions(folder=str(tmp_path)))
    found, problems = everything.texts, everything.problems
    assert found == {"a.png": "one", "inner/a.jpg": "two"} and not problems


def test_decomposed_names_match_composed_ones(tmp_path: Path) -> None:
    write_picture(tmp_path / unicodedata.normalize("NFC", "Zoë.png"))
    (tmp_path / unicodedata.normalize("NFD", "Zoë.txt")).write_text("zoe")
    everything = read_captions(list_folder(tmp_path), DataOptions(folder=str(tmp_path)))
    found, problems = everything.texts, everything.problems
    assert list(found.values()) == ["zoe"] and not problems


def test_one_for_all(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", caption="not read")
    write_picture(tmp_path / "b.png")
    (tmp_path / "alone.txt").write_text("not read either")
    everything = read_captions(list_folder(tmp_path), DataOptions(folder=str(tmp_path), caption="sks"))
    found, problems = everything.texts, everything.problems
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
    problems = read_captions(listing, DataOptions(folder=str(tmp_path))).problems
    assert {p.name: p.reason for p in problems} == {
        "b.png": "has no caption (b.txt)",
        "c.png": "its caption c.txt is empty",
        "d.txt": "cannot be read (not UTF-8 at byte 3)",
        "e.txt": "is a caption of a picture that cannot be read here",
        "f.txt": "is a caption without a picture",
    }
    everything = read_captions(listing, DataOptions(folder=str(tmp_path), missing_captions="empty"))
    found, problems = everything.texts, everything.problems
    assert found == {"a.png": "one", "b.png": "", "c.png": ""}
    assert sorted(p.name for p in problems) == ["d.txt", "e.txt", "f.txt"]


# --- other files than .txt -----------------------------------------------------------------------------------


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        write_picture(folder / name)
    return folder


def read(folder: Path, **keys: Any) -> Captions:
    return read_captions(list_folder(folder), DataOptions(folder=str(folder), **keys))


def told(found: Captions) -> dict[str, str]:
    return {problem.name: problem.reason for problem in found.problems}


@pytest.mark.parametrize(("name", "content", "caption"), [
    ("a.caption", "a dog\n", "a dog"), ("a.png.txt", "a dog", "a dog"), ("a.TXT", "a dog", "a dog"),
    ("a.json", '"a dog"', "a dog"), ("a.json", '{"caption": "a dog", "text": "no"}', "a dog"),
    ("a.json", '{"caption": "", "text": "a dog", "score": 3}', "a dog"), ("a.json", '{"prompt": "a dog"}', "a dog"),
    ("a.json", '{"tags": ["dog", " big "]}', "dog, big"), ("a.json", '{"tags": "dog, big"}', "dog, big"),
    ("a.json", '{"caption": "a dog", "tags": "dog, big"}', "a dog, dog, big"),
    ("a.json", '{"caption": ["one", "two"], "tags": ["x"]}', "one, x two, x"),
    ("a.png.json", '\ufeff{"caption": "a\\ndog"}', "a dog"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "a dog"}\n\n', "a dog"),
    ("metadata.jsonl", '{"file_name": "./a.png", "caption": "a dog", "prompt": "no"}', "a dog"),
    ("metadata.csv", "file_name,text\na.png,a dog\n", "a dog"),
    ("metadata.csv", 'tags,file_name\r\n"dog, big",a.png\r\n', "dog, big"),
    ("meta_cap.json", '{"/data/set/a.png": {"caption": "a dog", "tags": "big"}}', "a dog, big"),
    ("meta_lat.json", '{"a": {"caption": "a dog", "train_resolution": [512, 512]}}', "a dog"),
    ("meta.json", '{"C:\\\\set\\\\a.png": {"tags": "dog"}}', "dog"),
])
def test_each_kind_of_file(name: str, content: str, caption: str, tmp_path: Path) -> None:
    (pictures(tmp_path, "a.png") / name).write_text(content, encoding="utf-8")
    found = read(tmp_path)
    assert found.texts == {"a.png": caption} and not found.problems and not found.overruled


@pytest.mark.parametrize(("name", "content", "where", "reason"), [
    ("a.json", "{", "a.json", "is no JSON at line 1"), ("a.json", "3", "a.json", "neither a text nor an object"),
    ("a.json", '{"caption": 3}', "a.json", "its caption is no text"),
    ("a.json", '{"score": 3}', "a.png", "its caption a.json is empty"),
    ("a.json", "[" * 100_000, "a.json", "nested too deep"), ("a.caption", b"\xff", "a.caption", "not UTF-8"),
    ("b.caption", "a dog", "b.caption", "is a caption without a picture"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\nx', "metadata.jsonl", "line 2 is no JSON"),
    ("metadata.jsonl", '["a.png"]', "metadata.jsonl", "line 1 is no object"),
    ("metadata.jsonl", '{"text": "x"}', "metadata.jsonl", "line 1 has no file_name"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "metadata.jsonl", "line 1: its text is no text"),
    ("metadata.jsonl", '{"file_name": "b.png", "text": "x"}', "metadata.jsonl",
     "names pictures that are not here: b.png (line 1)"),
    ("a.json", '{"tags": {"general": ["dog"]}}', "a.json", "its tags is no text"),
    ("metadata.jsonl", '{"file_name": "../a.png", "text": "x"}', "metadata.jsonl", "not here: ../a.png (line 1)"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "metadata.jsonl",
     "says different things of one picture: a.png (line 1, line 2)"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": ""}', "a.png", "its caption metadata.jsonl is empty"),
    ("metadata.csv", "name,text\na.png,x", "metadata.csv", "has no column file_name"),
    ("metadata.csv", "file_name,score\na.png,1", "metadata.csv", "has no column caption, text, prompt or tags"),
    ("metadata.csv", "", "metadata.csv", "has no column file_name"),
    ("metadata.csv", 'file_name,text\na.png,"x', "metadata.csv", "is no CSV at line"),
    ("meta.json", '{"b.png": {"caption": "x"}}', "meta.json", "names no picture that is here: b.png"),
    ("meta.json", '{"b.png": {"caption": "x"}, "a": {"caption": "y"}}', "meta.json",
     "names pictures that are not here: b.png"),
    ("meta.json", '{"a.png": {"caption": 3}}', "meta.json", "key a.png: its caption is no text"),
    ("dataset_info.json", '{"features": {}}', "a.png", "has no caption (a.txt)"),
    ("notes.json", "[1, 2", "a.png", "has no caption (a.txt)"),
])
def test_each_thing_that_may_be_wrong_with_it(name: str, content: str | bytes, where: str, reason: str,
                                              tmp_path: Path) -> None:
    (pictures(tmp_path, "a.png") / name).write_bytes(content.encode() if isinstance(content, str) else content)
    found = told(read(tmp_path))
    assert reason in found[where], found
    if where != "a.png" and name[0] != "a":
        assert found.get("a.png", "has no caption").startswith("has no caption")


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", "{"), ("a.json", '{"tags": {"general": ["dog"]}}'), ("metadata.csv", "name,score\na,3"),
    ("metadata.jsonl", "x"), ("config.json", '{"sampler": {"prompt": "x"}}'), ("b.parquet", "x")])
def test_files_about_something_else_stop_nobody_who_has_captions(name: str, content: str, tmp_path: Path) -> None:
    (pictures(tmp_path, "a.png") / name).write_text(content)
    assert name in told(read(tmp_path))
    (tmp_path / "a.txt").write_text("a dog")
    found = read(tmp_path)
    assert found.texts == {"a.png": "a dog"} and not found.problems and list(found.unread) == [name]


SOURCES = {"a.txt": "1", "a.caption": "2", "a.json": '"3"',
           "metadata.jsonl": '{"file_name": "a.png", "text": "4"}', "metadata.csv": "file_name,text\na.png,5",
           "meta.json": '{"a.png": {"caption": "6"}}'}


@pytest.mark.parametrize("first", range(len(SOURCES)))
def test_the_first_kind_that_says_anything_counts(first: int, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    for i, (name, content) in enumerate(SOURCES.items()):
        if i >= first:
            (tmp_path / name).write_text(content)
        elif name.startswith("a.") and name != "a.json":
            (tmp_path / name).write_text("  ")  # says nothing
    found, names = read(tmp_path), list(SOURCES)
    assert found.texts == {"a.png": str(first + 1)} and not found.problems
    assert list(found.overruled) == ["a.png"] * (first < len(names) - 1)
    if found.overruled:
        assert found.overruled["a.png"] == f"{names[first]} goes before {' and '.join(names[first + 1:])}"


@pytest.mark.parametrize(("source", "caption"), [("txt", "1"), ("caption", "2"), ("json", "3"), ("table", "4")])
def test_only_the_kind_that_is_asked_for(source: str, caption: str, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    for name, content in SOURCES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "c.txt").write_text("alone")
    found = read(tmp_path, caption_source=source, missing_captions="empty")
    assert found.texts == {"a.png": caption, "b.png": ""}
    assert list(told(found)) == (["c.txt"] if source == "txt" else [])
    missing = told(read(tmp_path, caption_source=source))["b.png"]
    assert missing == "has no caption (" + (f"b.{source})" if source != "table" else
                                            "metadata.csv, metadata.jsonl, meta.json)")


def test_files_that_agree_are_not_told_of(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a dog\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": " a dog "}')
    found = read(tmp_path)
    assert found.texts == {"a.png": "a dog"} and not found.overruled and not found.problems


def test_the_nearest_table_goes_before_others(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "in/a.png", "in/b.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(
        f'{{"file_name": "{name}", "text": "outer"}}' for name in ("a.png", "in/a.png", "in/b.png")))
    (tmp_path / "in" / "metadata.csv").write_text("file_name,text\na.png,inner")
    found = read(tmp_path)
    assert found.texts == {"a.png": "outer", "in/a.png": "inner", "in/b.png": "outer"} and not found.problems
    assert found.overruled == {"in/a.png": "in/metadata.csv goes before metadata.jsonl"}


def test_tables_of_one_rank_must_agree(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "meta_1.json").write_text('{"a": {"caption": "x"}, "b": {"caption": "same"}}')
    (tmp_path / "meta_2.json").write_text('{"a": {"caption": "y"}, "b": {"caption": "same"}}')
    assert told(read(tmp_path)) == {
        "meta_2.json": "disagrees with meta_1.json, and neither goes before the other: a.png"}


def test_a_path_of_kohyas_is_known_by_its_end(tmp_path: Path) -> None:
    pictures(tmp_path, "one/a.png", "two/a.png", "c.jpg")
    (tmp_path / "meta.json").write_text('{"/old/set/one/a.png": {"caption": "1"}, "two/a": {"caption": "2"}, '
                                        '"/old/c": {"caption": "3"}}')
    assert read(tmp_path).texts == {"one/a.png": "1", "two/a.png": "2", "c.jpg": "3"}


def test_many_rows_without_a_picture_are_one_line(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n" + "".join(f"n{i}.png,y\n" for i in range(1500)))
    assert told(read(tmp_path))["metadata.csv"].endswith("n4.png (line 7), and 1,495 more")


def test_lines_are_kept_apart_where_they_are_alternatives(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("one\n\n two\r\n")
    assert read(tmp_path).texts == {"a.png": "one two"}
    assert read(tmp_path, wildcards=True).texts == {"a.png": "one\ntwo"}
    assert read(tmp_path, wildcards=True, caption=" x\n\ny").texts == {"a.png": "x\ny"}


# --- parquet -------------------------------------------------------------------------------------------------


def test_without_the_library_the_extra_is_named_where_it_is_needed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (pictures(tmp_path, "a.png") / "captions.parquet").write_bytes(b"PAR1")
    reason = "cannot be read (needs the package pyarrow; pip install 'impasto[parquet]')"
    assert told(read(tmp_path)) == {"a.png": "has no caption (a.txt)", "captions.parquet": reason}
    (tmp_path / "a.txt").write_text("x")
    found = read(tmp_path)
    assert not found.problems and found.unread == {"captions.parquet": reason}


def test_a_parquet_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures(tmp_path, "a.png", "b.png")
    rows = {"file_name": ["a.png", "b.png"], "text": ["a dog", None], "tags": [["x", "y"], ["z"]], "score": [1, 2]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "captions.parquet")
    found = read(tmp_path)
    assert found.texts == {"a.png": "a dog, x, y", "b.png": "z"} and not found.problems
    parquet.write_table(pyarrow.table({"name": ["a.png"]}), tmp_path / "captions.parquet")
    assert "has no column file_name" in told(read(tmp_path))["captions.parquet"]
    (tmp_path / "captions.parquet").write_bytes(b"PAR1 no")
    assert "is no parquet that can be read" in told(read(tmp_path))["captions.parquet"]
