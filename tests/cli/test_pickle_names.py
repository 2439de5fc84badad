from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from impasto.cli import app, pickle_names


class Hostile:
    """Would leave a file behind if it were run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def inspect(capsys, path: Path) -> dict:
    with pytest.raises(SystemExit) as ended:
        app.main(["inspect", str(path), "--json"])
    assert not ended.value.code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("protocol", range(6))
def test_names_are_seen_in_each_protocol(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "a.ckpt", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"a": 1, "b": [Hostile(mark), Hostile(mark)]}, protocol=protocol))
    named = pickle_names.names(path)
    assert any(name.startswith("pathlib") for name in named)
    assert "?" not in named
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_names_are_seen_in_both_formats_of_torch(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(3)}}, path, _use_new_zipfile_serialization=zipped)
    assert pickle_names.names(path) == ["collections.OrderedDict", "torch.FloatStorage",
                                        "torch._utils._rebuild_tensor_v2"]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_run(tmp_path: Path, capsys, zipped: bool) -> None:
    path, mark = tmp_path / "a.ckpt", tmp_path / "mark"
    torch.save({"w": torch.ones(3), "x": Hostile(mark)}, path, _use_new_zipfile_serialization=zipped)
    found = inspect(capsys, path)
    assert found["kind"] == "pickle" and "was refused" in found["refused"]
    assert any(name.startswith("pathlib.") for name in found["imports"])
    assert not mark.exists()
    with pytest.raises(SystemExit) as ended:
        app.main(["inspect", str(path)])
    assert not ended.value.code
    assert "was refused" in capsys.readouterr().out and not mark.exists()


@pytest.mark.parametrize("content", [
    b"\x80\x02", b"\x80\x04\x93.", b"\x80\x02\x94.", b"\x80\x02h\x00.", b"PK\x03\x04 no zip",
    b"\x80\x02" + b"\xff" * 50,
], ids=range(6))
def test_damage_is_no_defect(tmp_path: Path, capsys, content: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    pickle_names.names(path)
    assert inspect(capsys, path)["kind"] == "pickle"


def test_an_archive_that_is_no_checkpoint(tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert inspect(capsys, path)["imports"] == []
