"""Copies and near-copies among samples of several shards, against all pairs compared by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from impasto.data.dataset import decode
from impasto.data.looks import look_at
from impasto.data.shards import copies as shards_copies
from impasto.data.shards.copies import copies, firsts
from impasto.data.similar import ALIKE, SAME_COLOURS, grid_colours, picture_hash
from tests.data.photos import distance, encoded, photo
from tests.data.sharded import survey, write_shard


def pictures() -> list[bytes]:
    """Photos, some of them again: as they are, smaller, and with other colours."""
    found = [encoded(photo(i, (80, 64))) for i in range(40)]
    found += [found[i] for i in (3, 5, 3)]
    found += [encoded(photo(i, (80, 64)).resize((60, 70)), "JPEG", quality=80) for i in (3, 7, 9, 20)]
    found += [encoded(photo(i, (160, 128)), "JPEG", quality=60) for i in (7, 11)]
    return found + [encoded(photo(20, (80, 64)).convert("L"))]


def by_hand(data: list[bytes]) -> set[frozenset[int]]:
    """Groups of near-copies among different files: every pair of looks compared, and joined by repeated search."""
    looks = [look_at(each) for each in data]
    group = list(range(len(data)))
    first = [next(j for j in range(len(data)) if data[j] == data[i]) for i in range(len(data))]
    for i, j in itertools.combinations(sorted(set(first)), 2):
        tints = [np.frombuffer(bytes.fromhex(looks[k].colours), np.uint8).astype(float) for k in (i, j)]
        agree = np.corrcoef(*tints)[0, 1] >= SAME_COLOURS
        if agree and distance(int(looks[i].hash, 16), int(looks[j].hash, 16)) <= ALIKE:
            group = [group[i] if g == group[j] else g for g in group]
    return {frozenset(i for i in set(first) if group[i] == g) for g in group if group.count(g) > 1}


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, list[bytes]]:
    data = pictures()
    for shard in range(3):
        own = range(shard, len(data), 3)
        write_shard(tmp_path / f"{shard}.tar", dict(pair for i in own for pair in (
            (f"{i:02}.{'png' if data[i][:1] == bytes([0x89]) else 'jpg'}", data[i]), (f"{i:02}.txt", b"x"))))
    return tmp_path, data


def number_of(name: str) -> int:
    return int(Path(name).stem)


def test_columns_hold_what_a_look_says(shards: tuple[Path, list[bytes]]) -> None:
    folder, data = shards
    table = survey(folder).table
    for shard, index in enumerate(table.indexes):
        for row, i in enumerate(range(shard, len(data), 3)):
            look = look_at(data[i])
            assert index["colours"][row].tobytes().hex() == look.colours
            assert f"{int(index['hash'][row]):016x}" == look.hash
            assert (index["height"][row], index["width"][row]) == look.size == decode(data[i]).size[::-1]


@pytest.mark.parametrize("size", [(300, 260), (700, 1100), (130, 2000)])
def test_a_large_picture_s_hash_is_that_of_all_its_pixels_but_for_a_bit_or_two(
        size: tuple[int, int], tmp_path: Path) -> None:
    data = [encoded(photo(i, size)) for i in range(4)]
    write_shard(tmp_path / "a.tar", {f"{i}.png": picture for i, picture in enumerate(data)})
    index = survey(tmp_path, caption="x").table.indexes[0]
    for row, image in enumerate(map(decode, data)):
        assert distance(int(index["hash"][row]), picture_hash(image) or 0) <= 2
        colours = np.frombuffer(grid_colours(image), np.uint8).astype(int)
        assert np.abs(index["colours"][row].astype(int) - colours).max() <= 2


def test_near_copies_are_those_of_all_pairs_compared(shards: tuple[Path, list[bytes]]) -> None:
    folder, data = shards
    # numbers run through the shards, so that it is by names that groups are compared
    found = copies(survey(folder))
    near = {frozenset(number_of(name) for name in group.names) for group in found.groups if not group.exact}
    first = {data[i]: i for shard in (2, 1, 0) for i in reversed(range(shard, len(data), 3))}  # in the table's order
    expected = {frozenset(first[data[i]] for i in group) for group in by_hand(data)}
    assert near == expected and len(near) >= 5
    exact = {frozenset(number_of(name) for name in group.names) for group in found.groups if group.exact}
    assert exact == {frozenset(i for i in range(len(data)) if data[i] == data[j]) for j in (3, 5)}
    assert found.whole and found.looked == len(set(data)) and found.count(True) == 3
    assert found.count(False) == sum(len(group) - 1 for group in expected)
    for group in found.groups:
        looks = [look_at(data[number_of(name)]) for name in group.names]
        assert max(look.height * look.width for look in looks) == looks[0].height * looks[0].width
        assert group.distances == sorted(group.distances) == [
            distance(int(look.hash, 16), int(looks[0].hash, 16)) for look in looks]
        assert all(survey(folder).name(found.numbers[name]) == name for name in group.names)


def test_only_what_is_used_counts(tmp_path: Path) -> None:
    picture = encoded(photo(1, (64, 64)))
    write_shard(tmp_path / "a.tar", {"a.png": picture, "a.txt": b"x", "b.png": picture, "c.png": picture,
                                     "c.txt": b"x"})
    (group,) = copies(survey(tmp_path, bad_samples="skip")).groups
    assert group.names == ["a.tar/a.png", "a.tar/c.png"] and group.exact
    found = copies(survey(tmp_path), near=False)
    assert (found.looked, found.count(True), found.count(False)) == (0, 1, 0)


def test_of_many_groups_some_are_listed_and_all_counted(
        shards: tuple[Path, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = shards
    whole = copies(survey(folder))
    monkeypatch.setattr(shards_copies, "GROUPS", 1)
    monkeypatch.setattr(shards_copies, "MEMBERS", 2)
    some = copies(survey(folder))
    assert [len(group.names) for group in some.groups] == [2, 2]
    assert some.more == len(whole.groups) - 2
    assert all(some.count(exact) == whole.count(exact) for exact in (True, False))


def test_plain_pictures_look_like_nothing(tmp_path: Path) -> None:
    members = {f"{i}.png": encoded(Image.new("RGB", (64, 64), (200 + i,) * 3)) for i in range(3)}
    write_shard(tmp_path / "a.tar", members)
    found = copies(survey(tmp_path, caption="x"))
    assert found.groups == [] and found.looked == 0 and found.whole


def test_the_first_of_equal_values() -> None:
    assert firsts(np.array([5, 3, 5, 3, 9])).tolist() == [0, 1, 0, 1, 4]
