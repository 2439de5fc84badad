"""Encoded entries in tars: none twice, none stale, none lost but the last minute's, whatever is killed or deleted."""

from __future__ import annotations

import sqlite3
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from impasto.core.errors import UserError
from impasto.core.progress import SILENT
from impasto.data.cache import key_of
from impasto.data.shards import cache as shards_cache
from impasto.data.shards.cache import Making, Packs
from tests.data.filling import fill_packs, together

KEYS = [key_of(i) for i in range(50)]


def making(made: list[int]):
    def entry(i: int) -> dict[str, Making]:
        def encode(loaded: int) -> dict[str, torch.Tensor]:
            made.append(loaded)
            return {"x": torch.full((100,), float(loaded))}

        return {KEYS[i]: Making(lambda: i, encode)}

    return entry


def fill(packs: Packs, name: str = "", count: int = 50, rank: int = 0, world: int = 1) -> list[int]:
    made: list[int] = []
    assert packs.fill_many(count, making(made), name, "", "", SILENT, rank, world) == len(made)
    return made


def whole(packs: Packs) -> bool:
    return all(entry["x"].equal(torch.full((100,), float(i))) for i, entry in enumerate(packs.load_all(KEYS)))


@pytest.fixture(autouse=True)
def small_tars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_cache, "PACK_ENTRIES", 8)


def test_entries_are_made_once_in_few_files(tmp_path: Path) -> None:
    assert fill(Packs(tmp_path)) == list(range(50)) and fill(Packs(tmp_path)) == []
    assert whole(Packs(tmp_path)) and len(list(tmp_path.glob("*.tar"))) == 7
    assert Packs(tmp_path).load(key_of("other")) is None


def test_the_tars_are_everybody_s(tmp_path: Path) -> None:
    fill(Packs(tmp_path))
    found = {}
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = load(file.read())["x"][0].item()
    assert found == {f"{key}.safetensors": float(i) for i, key in enumerate(KEYS)}


def test_the_first_thirty_go_on_to_fifty(tmp_path: Path) -> None:
    fill(Packs(tmp_path), count=30)
    assert fill(Packs(tmp_path)) == list(range(30, 50)) and whole(Packs(tmp_path))


def test_what_is_lost_is_made_again(tmp_path: Path) -> None:
    fill(Packs(tmp_path), "all of it")
    assert fill(Packs(tmp_path), "all of it") == []
    first, second, *_ = sorted(tmp_path.glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-600])
    made = fill(Packs(tmp_path), "all of it")
    assert 8 < len(made) <= 16 and whole(Packs(tmp_path)) and fill(Packs(tmp_path), "all of it") == []


def test_a_lost_index_is_made_from_the_tars(tmp_path: Path) -> None:
    fill(Packs(tmp_path))
    (tmp_path / "index.sqlite").unlink()
    assert fill(Packs(tmp_path)) == [] and whole(Packs(tmp_path))


def test_a_damaged_index_is_one_line(tmp_path: Path) -> None:
    fill(Packs(tmp_path))
    (tmp_path / "index.sqlite").write_bytes(b"no database " * 1000)
    with pytest.raises(UserError, match=r"index\.sqlite.*delete that file"):
        fill(Packs(tmp_path))


def test_a_damaged_entry_is_an_error_once_and_then_made_again(tmp_path: Path) -> None:
    packs = Packs(tmp_path)
    fill(packs, "all of it")
    path = packs.path(KEYS[3])
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        (offset,) = index.execute("select offset from entries where key = ?", (bytes.fromhex(KEYS[3]),)).fetchone()
    index.close()
    data = bytearray(path.read_bytes())
    data[offset + 300] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="lost or damaged during the run.*run the same command again"):
        Packs(tmp_path).load_all(KEYS)
    assert fill(Packs(tmp_path), "all of it") == [3] and whole(Packs(tmp_path))


def test_an_interrupted_filling_keeps_what_it_has(tmp_path: Path) -> None:
    def broken(i: int) -> dict[str, Making]:
        def encode(loaded: int) -> dict[str, torch.Tensor]:
            if loaded == 20:
                raise UserError("no more")
            return {"x": torch.full((100,), float(loaded))}

        return {KEYS[i]: Making(lambda: i, encode)}

    with pytest.raises(UserError, match="no more"):
        Packs(tmp_path).fill_many(50, broken, "", "", "", SILENT)
    assert fill(Packs(tmp_path)) == list(range(20, 50))


def test_a_tar_is_closed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_cache, "PACK_SECONDS", 0.0)
    fill(Packs(tmp_path), count=5)
    assert len(list(tmp_path.glob("*.tar"))) == 5


def test_each_rank_begins_at_its_own_share(tmp_path: Path) -> None:
    assert fill(Packs(tmp_path), rank=1, world=2) == [*range(25, 50), *range(25)]
    assert fill(Packs(tmp_path), rank=0, world=2) == []


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    together(fill_packs, tmp_path)
    packs = Packs(tmp_path)
    assert all(packs.load_all([key_of(i)])[0]["x"].equal(torch.full((100,), float(i))) for i in range(200))
    assert not list(tmp_path.rglob("*.part"))
