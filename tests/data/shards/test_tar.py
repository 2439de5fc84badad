"""Members of a tar, as Python's tarfile reads them; and tars that are cut, damaged or no tars."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from impasto.data.shards.tar import CutShort, Member, members
from tests.data.sharded import write_shard

LONG = "folder-" * 20 + "/" + "name" * 40 + ".jpg"
NAMES = ["a.jpg", "inner/b.txt", "ünï.png", "empty.txt", LONG]


def read(data: bytes, *, keep: bool = True) -> list[Member]:
    return list(members(io.BytesIO(data).read, lambda name, size: keep))


def contents() -> dict[str, bytes]:
    rng = random.Random(0)
    return {name: rng.randbytes(0 if name == "empty.txt" else rng.randrange(1, 3000)) for name in NAMES}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_reads(format: int, tmp_path: Path) -> None:
    made = {name: data for name, data in contents().items() if format != tarfile.USTAR_FORMAT or len(name) < 100}
    path = write_shard(tmp_path / "a.tar", made, format)
    data = path.read_bytes()
    found = read(data)
    assert [(member.name, member.data) for member in found] == list(made.items())
    assert all(data[member.offset:member.offset + member.size] == made[member.name] for member in found)
    with tarfile.open(path) as tar:
        assert [(member.name, member.offset, member.size) for member in found] == \
            [(member.name, member.offset_data, member.size) for member in tar]
    assert [(m.name, m.offset, m.data) for m in read(data, keep=False)] == [(m.name, m.offset, None) for m in found]


def test_folders_and_links_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("l" * 150, tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "t" * 150
            tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [(member.name, member.data) for member in read((tmp_path / "a.tar").read_bytes())] == [("a.txt", b"abc")]


@pytest.mark.parametrize("keep", [True, False])
def test_wherever_a_tar_is_cut_what_is_whole_is_read_and_the_rest_told(keep: bool, tmp_path: Path) -> None:
    made = {name: data for name, data in contents().items() if len(name) < 100}
    whole = write_shard(tmp_path / "a.tar", made).read_bytes()
    all_members = read(whole)
    end = all_members[-1].offset + -(-all_members[-1].size // 512) * 512  # where the end marker begins
    for cut in [*range(0, end, 97), *range(512, end + 1, 512)]:
        found: list[Member] = []
        if not cut:
            continue
        with pytest.raises((CutShort, ValueError)) as caught:
            for member in members(io.BytesIO(whole[:cut]).read, lambda name, size: keep):
                found.append(member)
        assert [m.name for m in found] == [m.name for m in all_members if m.offset + -(-m.size // 512) * 512 <= cut]
        if cut >= 512:
            assert isinstance(caught.value, CutShort)
            broken = next((m for m in all_members if m.offset <= cut < m.offset + m.size), None)
            if broken is not None:
                missing = broken.offset + broken.size - cut
                assert caught.value.name == broken.name and f"{missing:,} byte" in caught.value.reason
    assert read(whole[:end + 512]) == all_members


@pytest.mark.parametrize(("data", "says"), [
    (b"", "an empty file"), (b"x" * 100, "no tar file"), (b"x" * 2000, "no tar file"),
    (gzip.compress(b"x" * 2000, mtime=0), "compressed"),
])
def test_what_is_no_tar(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read(data)


def test_a_damaged_header_is_told_with_its_place(tmp_path: Path) -> None:
    data = bytearray(write_shard(tmp_path / "a.tar", {"a.txt": b"a", "b.txt": b"b"}).read_bytes())
    data[1024 + 5] ^= 1
    with pytest.raises(ValueError, match="damaged at byte 1,024"):
        read(bytes(data))


def test_any_bytes_are_read_or_told(tmp_path: Path) -> None:
    """No damage to a tar is anything but an answer or one of the two errors."""
    whole = write_shard(tmp_path / "a.tar", contents(), tarfile.PAX_FORMAT).read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read(bytes(data[:rng.randrange(len(data))] if rng.random() < 0.3 else data))
        except (CutShort, ValueError):
            pass
