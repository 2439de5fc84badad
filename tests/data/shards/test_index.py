"""What is known of shards from one reading: samples, captions, what is wrong; and that it is one reading."""

from __future__ import annotations

import io
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from impasto.core.errors import UserError
from impasto.data.shards import access as shards_access
from impasto.data.shards import index as shards_index
from impasto.data.shards import table
from impasto.data.shards.index import Status, open_index
from impasto.data.shards.read import split
from impasto.data.shards.table import Survey, Use, caption_of, open_table, refuse_samples, surveyed
from tests.data.sharded import aged, bad_shard, options, sample, serving, survey, write_shard, write_shards


def uses(found: Survey) -> dict[str, str]:
    """Each sample with what becomes of it."""
    table = found.table
    return {table.name(*table.find(i)): Use(int(use)).name for i, use in enumerate(found.use)}


@pytest.mark.parametrize(("name", "parts"), [
    ("a.jpg", ("a", "jpg")), ("x/a.b.PNG", ("x/a", "b.png")), ("./x/a.jpg", ("x/a", "jpg")), ("a", ("", "")),
    (".hidden.jpg", ("", "")), ("x/._a.jpg", ("", "")), ("v1.5/a.jpg", ("v1.5/a", "jpg")),
])
def test_keys_are_those_of_webdataset(name: str, parts: tuple[str, str]) -> None:
    assert split(name) == parts


def test_samples_and_their_captions(tmp_path: Path) -> None:
    picture = sample("x", 0, caption=None)["x.png"]
    said = {"caption": "in json", "url": "http://x"}
    path = write_shard(tmp_path / "a.tar", {
        "a.png": picture, "a.txt": b"in txt\nand more", "a.json": json.dumps(said).encode(), "a.cls": b"3",
        "b.json": json.dumps(said).encode(), "b.png": picture, "c.caption": "\ufeffwörter".encode("utf-8"),
        "c.JPEG": picture, "d.seg.png": picture, "d.png": picture, "d.txt": b"  "})
    table = survey(path).table
    rows = [table.indexes[0].words(row) for row in range(len(table))]
    assert [(row.key, row.extension) for row in rows] == [("a", "png"), ("b", "png"), ("c", "jpeg"), ("d", "png")]
    assert rows[0].captions == {"txt": "in txt\nand more", "json": "in json"}

    def captions(**keys: Any) -> list[str]:
        return [caption_of(table.indexes[0], row, options(path, **keys)) for row in range(4)]

    assert captions() == ["in txt and more", "in json", "wörter", ""]
    assert captions(caption_source="json") == ["in json", "in json", "", ""]
    assert captions(wildcards=True)[0] == "in txt\nand more"
    assert captions(caption="one for all") == ["one for all"] * 4
    data = path.read_bytes()
    for row in range(4):
        index = table.indexes[0]
        offset, size = int(index["offset"][row]), int(index["size"][row])
        assert data[offset:offset + size] == picture


def test_what_cannot_be_used_is_told_by_name(tmp_path: Path) -> None:
    found = survey(bad_shard(tmp_path))
    assert [Use(int(use)).name for use in found.use] == [
        "USED", "NO_PICTURE", "NO_PICTURE", "BROKEN", "NO_CAPTION", "NO_PICTURE", "TOO_SMALL", "NO_CAPTION", "TWICE"]
    reasons = {problem.name: problem.reason for _, problem in found.problems()}
    assert "has no picture, only .txt" in reasons["bad.tar/no-picture"] and ".heic" in reasons["bad.tar/heic"]
    assert "damaged" in reasons["bad.tar/broken.png"] and "two pictures" in reasons["bad.tar/two.png"]
    assert "no caption (no .txt or .caption or .json" in reasons["bad.tar/bare.png"]
    assert "too small (4x4" in reasons["bad.tar/dot.png"] and "not UTF-8" in reasons["bad.tar/latin.png"]
    assert "twice" in reasons["bad.tar/good.png"]
    with pytest.raises(UserError) as caught:
        refuse_samples(found)
    assert all(f"bad.tar/{name}" in str(caught.value) for name in ("no-picture", "broken.png", "latin.png"))
    assert "8 samples" in str(caught.value) and "bad_samples=skip" in str(caught.value)
    skipping = survey(tmp_path / "bad.tar", bad_samples="skip", missing_captions="empty")
    (line,) = refuse_samples(skipping)
    assert "3 without a picture" in line and "1 whose picture cannot be read" in line and "1 too small" in line
    assert [skipping.table.name(*skipping.table.find(i)) for i in skipping.used.tolist()] == [
        "bad.tar/good.png", "bad.tar/bare.png"]
    one = survey(tmp_path / "bad.tar", caption="one for all", bad_samples="skip")
    assert len(one.used) == 3  # the caption that cannot be read is not needed


def test_many_problems_are_named_up_to_a_limit(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {f"{i}.txt": b"x" for i in range(50)})
    with pytest.raises(UserError, match="50 samples cannot be used") as caught:
        refuse_samples(survey(path))
    assert str(caught.value).count("a.tar/") == table.NAMED and "and 30 more" in str(caught.value)


# --- cut short ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over_http", [False, True])
def test_a_shard_cut_short_is_one_line(over_http: bool, tmp_path: Path) -> None:
    """Which shard, which sample, what to do."""
    (path,) = write_shards(tmp_path / "s", [[(64, 64)] * 4])
    index = survey(path).table.indexes[0]
    cut = int(index["offset"][2]) + 700
    missing = int(index["size"][2]) - 700
    path.write_bytes(path.read_bytes()[:cut])
    aged(path)
    with serving(tmp_path / "s") as server:
        spec = server.url(path.name) if over_http else path
        found = survey(spec)
        with pytest.raises(UserError) as caught:
            refuse_samples(found)
        assert str(caught.value) == (
            f"shard-0000.tar/000002: the shard is cut short here: {missing:,} bytes of 000002.png are missing; fetch "
            "or make the shard again, or do without the rest of it with data.bad_samples=skip")
        skipping = survey(spec, bad_samples="skip")
        assert refuse_samples(skipping) == ["samples that are left out: 1 cut short with their shard"]
        assert skipping.used.tolist() == [0, 1]


def test_cut_in_a_caption_and_between_samples(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [[(64, 64)] * 3])
    whole = path.read_bytes()
    ends = [int(place) + -(-int(size) // 512) * 512 for place, size in zip(
        *(survey(path).table.indexes[0][name] for name in ("offset", "size")), strict=True)]
    for cut, used, says in ((ends[1] + 512 + 3, [0], "000001: the shard is cut short here: 6 bytes of 000001.txt"),
                            (ends[1] + 1024, [0, 1], "after this sample: tar's end marker is missing"),
                            (ends[1] + 1024 + 9, [0, 1], "after this sample")):
        path.write_bytes(whole[:cut])
        aged(path)
        with pytest.raises(UserError, match=says):
            refuse_samples(survey(path))
        assert survey(path, bad_samples="skip").used.tolist() == used


def test_what_is_no_shard_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("hello")
    with pytest.raises(UserError, match=r"a\.tar: is no tar file; make it again, or take it out of data\.shards"):
        survey(tmp_path / "a.tar")
    with pytest.raises(UserError, match="no samples"):
        survey(write_shard(tmp_path / "empty.tar", {}))


# --- read once ---------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read from end to end."""
    names: list[str] = []
    plain = table.read_shard

    def noted(shard: shards_access.Shard, *rest: Any) -> None:
        names.append(shard.label)
        plain(shard, *rest)

    monkeypatch.setattr(table, "read_shard", noted)
    return names


def test_a_shard_is_read_once_and_again_when_it_changed(tmp_path: Path, reads: list[str], user_cache: Path) -> None:
    paths = write_shards(tmp_path, [[(64, 64)] * 2] * 3)
    first = survey(tmp_path)
    assert sorted(reads) == [path.name for path in paths]
    assert uses(survey(tmp_path)) == uses(first) and len(reads) == 3
    survey(paths[1])  # another recipe over one of them
    assert len(reads) == 3
    write_shard(paths[1], sample("new", 9))
    assert "shard-0001.tar/new.png" in uses(survey(tmp_path)) and reads[3:] == ["shard-0001.tar"]
    os.utime(paths[2])  # just touched: it may change again without a new time stamp
    survey(tmp_path)
    survey(tmp_path)
    assert reads[4:] == ["shard-0002.tar"] * 2
    for index in (user_cache / "shards").glob("*.safetensors"):
        data = bytearray(index.read_bytes())
        data[-1] ^= 1
        index.write_bytes(data)
    survey(paths[0])
    assert reads[6:] == ["shard-0000.tar"]


def test_another_version_s_index_is_made_anew(
        tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write_shards(tmp_path, [[(64, 64)]])
    with monkeypatch.context() as patch:
        patch.setattr(shards_index, "VERSION", shards_index.VERSION - 1)
        survey(path)
    survey(path)
    survey(path)
    assert reads == [path.name] * 2


def test_over_http_too(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [[(64, 64)] * 3] * 2)
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*"))
    with serving(tmp_path / "s") as server:
        spec = server.url("shard-{0000..0001}.tar")
        first = survey(spec)
        assert len(first.used) == 6 and server.sent == size + 2
        survey(spec)
        assert server.sent == size + 4  # a byte each, to see that they are the same
        write_shard(tmp_path / "s" / "shard-0001.tar", sample("new", 9))
        assert len(survey(spec).used) == 4 and server.sent > size + 6
    with serving(tmp_path / "s", ranges=False) as server:
        notes = server.asked
        assert len(survey(server.url("shard-{0000..0001}.tar")).used) == 4
        whole = len([path for path, wanted in notes if wanted is None])
        survey(server.url("shard-{0000..0001}.tar"))
        assert whole == 2 and len([path for path, wanted in notes if wanted is None]) == 2


def test_an_index_lies_beside_the_cache(tmp_path: Path, user_cache: Path) -> None:
    write_shards(tmp_path / "s", [[(64, 64)]])
    survey(tmp_path / "s")
    (index,) = (user_cache / "shards").glob("*.safetensors")
    survey(tmp_path / "s", cache=str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine" / "shards").glob("*.safetensors")] == [index.name]
    found = open_index(index)
    assert found is not None and len(found) == 1 and found["status"][0] == Status.GOOD
    from safetensors.numpy import load_file

    assert load_file(index)["height"].tolist() == [64]  # the format is everybody's


def test_names_tell_shards_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name / "s.tar", sample("0", 1))
    assert list(uses(survey([str(tmp_path / "a"), str(tmp_path / "b")]))) == [
        f"{tmp_path / 'a' / 's.tar'}/0.png", f"{tmp_path / 'b' / 's.tar'}/0.png"]


# --- memory ------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """Beside the mapped index a sample takes a few bytes, while it is read and afterwards."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(file, "PNG")
    counts = (500, 3000)
    for count in counts:
        members = {}
        for i in range(count):
            members |= {f"{i:08d}.png": file.getvalue(), f"{i:08d}.txt": f"caption number {i} of the set".encode()}
        write_shard(tmp_path / str(count) / "a.tar", members)
    figures = []
    for count in counts:
        data = options(tmp_path / str(count), resolution=8)
        open_table(data)  # imports and first uses
        shutil.rmtree(table.index_folder(data))
        tracemalloc.start()
        found = surveyed(open_table(data), data)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(found.used) == count
        figures.append((kept, peak))
    (kept_few, peak_few), (kept_many, peak_many) = figures
    samples = counts[1] - counts[0]
    assert (kept_many - kept_few) / samples < 20  # bytes: what becomes of each, and its bucket
    assert (peak_many - peak_few) / samples < 400
