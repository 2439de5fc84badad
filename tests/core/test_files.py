"""Files are whole or absent, and a lock names its holder."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from impasto.core import files
from impasto.core.errors import UserError


def test_atomic_write_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "x.bin"
    with files.atomic_write(target) as file:
        file.write(b"one")
    with files.atomic_write(target) as file:
        file.write(b"two")
        assert target.read_bytes() == b"one"
    assert target.read_bytes() == b"two"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_modes_of_ordinary_ones(tmp_path: Path) -> None:
    with files.atomic_write(tmp_path / "a") as file:
        file.write(b"a")
    (tmp_path / "b").write_bytes(b"b")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_atomic_write_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    with pytest.raises(ValueError), files.atomic_write(target) as file:
        file.write(b"half")
        raise ValueError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"), files.atomic_write(tmp_path / "x.bin") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)
    assert "disk is full" in str(files.disk_error(raised.value, tmp_path / "x"))


def test_atomic_folder_appears_whole_or_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError), files.atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("a")
        raise ValueError
    assert not list(tmp_path.iterdir())
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "a").read_text() == "a" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_what_a_library_hides_in_a_folder_is_shown(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "x").mkdir()
        (folder / "x" / "b").touch(mode=0o600)  # as safetensors' save_file does
    assert (tmp_path / "f" / "x" / "b").stat().st_mode == (tmp_path / "a").stat().st_mode


def test_digest_is_blake2b(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert files.digest(tmp_path / "x") == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_remembered_facts_are_forgotten_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("a")
    memory = files.Remembered(tmp_path / "store.json")
    memory.put(file, "digest", "d")
    memory.save()
    assert files.Remembered(tmp_path / "store.json").get(file, "digest") == "d"
    file.write_text("longer")
    assert files.Remembered(tmp_path / "store.json").get(file, "digest") is None
    (tmp_path / "store.json").write_text("{ damaged")
    assert files.Remembered(tmp_path / "store.json").get(file, "digest") is None


def test_a_held_lock_names_its_holder(tmp_path: Path) -> None:
    with files.locked(tmp_path / ".lock", doing="training here"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is already training here"):
            with files.locked(tmp_path / ".lock", doing="training here"):
                pass
    with files.locked(tmp_path / ".lock", doing="training here"):
        pass


@pytest.mark.parametrize("left", [(), ("runs/log.jsonl",), ("runs/new/dog/log.jsonl",)])
def test_a_folder_made_for_a_lock_goes_with_what_failed(tmp_path: Path, left: tuple[str, ...]) -> None:
    """So far as nothing else has come to lie in it; one that was there stays."""
    lock = tmp_path / "runs/new/dog/.lock"
    with pytest.raises(ValueError), files.locked(lock, doing="training here"):
        for name in left:
            (tmp_path / name).touch()
        raise ValueError
    assert lock.exists() == lock.parent.exists() == ("runs/new/dog/log.jsonl" in left)
    assert (tmp_path / "runs").exists() == bool(left) and all((tmp_path / name).exists() for name in left)
    with files.locked(lock, doing="training here"):
        pass
    with pytest.raises(ValueError), files.locked(lock, doing="training here"):
        raise ValueError
    assert lock.parent.is_dir()


def test_what_is_not_there_is_told_with_what_lies_beside_it(tmp_path: Path) -> None:
    dog = tmp_path / "dog.safetensors"
    dog.touch()
    for path, fix in ((tmp_path / "dgo.safetensors", "did you mean 'dog.safetensors'?"),
                      (tmp_path / "cat.png", f"looked for in {tmp_path}"),
                      (tmp_path / "runs" / "one" / "dog.png", f"there is no folder {tmp_path / 'runs'}"),
                      (dog / "x", f"there is no folder {dog}")):
        assert str(files.no_such_file(path)) == f"{path}: no such file; {fix}"
