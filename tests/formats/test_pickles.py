"""Pickles are read without running them: each stand-in beside a hostile twin, and files that are broken."""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from impasto.core.errors import UserError
from impasto.formats.pickles import STAND_INS, Inert, ModelCheckpoint, ParameterDict, load_pickle, weights_in


def archive(path: Path, program: bytes) -> Path:
    """A zip file as torch writes it, whose pickle is `program`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return path


def legacy(path: Path, program: bytes) -> Path:
    """torch's file of before 2020: pickles in a row."""
    head = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(head + program + pickle.dumps([], protocol=2))
    return path


def called(name: str, *arguments: bytes) -> bytes:
    """Opcodes that call the global `name` with arguments given as opcodes."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def text(word: str) -> bytes:
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


# --- what is let through --------------------------------------------------------------------------------


def test_weights_come_back(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.float16), "n": torch.tensor(3)}
    for name, modern in (("new.ckpt", True), ("old.ckpt", False)):
        torch.save({"state_dict": weights, "title": "x", "epoch": 3}, tmp_path / name,
                   _use_new_zipfile_serialization=modern)
        tensors, texts = weights_in(load_pickle(tmp_path / name), tmp_path)
        assert tensors.keys() == weights.keys() and texts == {"title": "x"}
        assert all(torch.equal(tensors[key], weights[key]) and tensors[key].dtype == weights[key].dtype
                   for key in weights)
    torch.save(OrderedDict(weights), tmp_path / "flat.bin")
    assert weights_in(load_pickle(tmp_path / "flat.bin"), tmp_path)[0].keys() == weights.keys()


def test_what_lightning_leaves_beside_the_weights(tmp_path: Path, monkeypatch) -> None:
    """As in the published sd-v1-4.ckpt: a class as a key, a numpy score."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {callback: {"best": numpy.float64(0.1)}}}, path)
    for name in (module.__name__, "pytorch_lightning.callbacks", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name)
    loaded = load_pickle(path)
    assert list(loaded["callbacks"]) == [ModelCheckpoint]
    assert isinstance(loaded["callbacks"][ModelCheckpoint]["best"], Inert)
    assert weights_in(loaded, path)[0]["w"].tolist() == [1, 1]
    assert "pytorch_lightning" not in sys.modules


def test_parameter_dicts_of_old_embeddings(tmp_path: Path) -> None:
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 768))})
    path = tmp_path / "cat.pt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": vectors}, path)
    loaded = load_pickle(path)
    assert isinstance(loaded["string_to_param"], ParameterDict)
    assert torch.equal(loaded["string_to_param"].parameters["*"], vectors["*"])
    assert not loaded["string_to_param"].parameters["*"].requires_grad


def test_old_and_new_names_of_numpy(tmp_path: Path) -> None:
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        kind = called("numpy.dtype", text("f8"), b"K\x00", b"K\x01") + b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xff" \
            b"J\xff\xff\xff\xffK\x00tb"
        value = called(f"{module}.scalar", kind, called("_codecs.encode", text("12345678"), text("latin1")))
        assert isinstance(load_pickle(archive(tmp_path / "x.ckpt", program(value))), Inert)


# --- what is not ----------------------------------------------------------------------------------------


def hostile(marker: Path) -> dict[str, bytes]:
    """Programs that would create the file `marker`, or reach for what could."""
    touch = text(f"touch {marker}")
    system = called("os.system", touch)
    state = b"}" + text("__class__") + system + b"s"
    return {
        "plain": system,
        "posix": called("posix.system", touch),
        "builtins": called("builtins.eval", text(f"open({str(marker)!r}, 'w')")),
        "subprocess": called("subprocess.getoutput", touch),
        "getattr": called("builtins.getattr", b"cos\nsystem\n", text("__call__")),
        "numpy": called("numpy.core.multiarray._reconstruct", touch),
        "numpy's file": called("numpy.fromfile", text(str(marker))),
        "torch.load": called("torch.load", text(str(marker))),
        "hub": called("torch.hub.load", text(str(marker))),
        "inst": b"(" + touch + b"ios\nsystem\n",
        "weights": b"}" + text("state_dict") + b"}" + text("w") + system + b"ss",
        **{f"argument of {name}": called(name, system) for name in STAND_INS},
        **{f"state of {name}": called(name) + system + b"b" for name in STAND_INS},
        **{f"inside the state of {name}": called(name) + state + b"b" for name in STAND_INS},
        **{f"attribute of {name}": called(f"{name}.__init__.__globals__", touch) for name in STAND_INS},
        **{f"beside {name}": called(name.rpartition(".")[0] + ".os.system", touch) for name in STAND_INS},
        **{f"reduced {name}": called(name) + b"(" + touch + b"tR" for name in STAND_INS},
    }


@pytest.mark.parametrize("kind", list(hostile(Path("x"))))
@pytest.mark.parametrize("write", [archive, legacy])
def test_code_is_refused_and_not_run(tmp_path: Path, kind, write) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "x.ckpt", program(hostile(marker)[kind]))
    with pytest.raises(UserError) as caught:
        load_pickle(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_refusal_names_what_was_wanted(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.ckpt", program(called("subprocess.getoutput", text("ls"))))
    with pytest.raises(UserError, match=r"wants to run code \(subprocess.getoutput\) and was refused; nothing of it"):
        load_pickle(path)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_run_nothing_either(tmp_path: Path, protocol) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = archive(tmp_path / "x.ckpt", pickle.dumps({"state_dict": Harm()}, protocol=protocol))
    with pytest.raises(UserError):
        load_pickle(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", list(STAND_INS))
def test_stand_ins_do_nothing_with_anything(tmp_path: Path, name) -> None:
    """Called with anything, given any state: no error, and nothing kept but an embedding's tensors."""
    for state in (b"N", b"}", text("x"), b"}" + text("_parameters") + b"K\x05s", b"(K\x01K\x02t",
                  b"}" + text("_parameters") + b"}K\x01" + text("x") + b"ss"):
        body = called(name, text("rm -rf"), b"K\x01", b"N", b"}", b"]") + state + b"b"
        loaded = load_pickle(archive(tmp_path / "x.ckpt", program(body)))
        assert type(loaded) is STAND_INS[name] and vars(loaded) in ({}, {"parameters": {}})


def test_the_allow_list_is_gone_afterwards(tmp_path: Path) -> None:
    load_pickle(archive(tmp_path / "x.ckpt", program(b"}")))
    assert not set(torch.serialization.get_safe_globals()) & {(kind, name) for name, kind in STAND_INS.items()}


# --- what is broken -------------------------------------------------------------------------------------


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        weights_in(load_pickle(path), path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    return line


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    assert "no such file" in one_line(path)
    path.write_bytes(b"")
    assert "is empty" in one_line(path)
    path.write_bytes(b"<!doctype html>")
    assert "not a file that torch wrote" in one_line(path)
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for length in (4, 10, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        assert "truncated or damaged" in one_line(path)
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (1, 10, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        one_line(path)
    for body in (b"", b"}K\x05s", b"0", b"K", b"h\x05", b"J\x01", called("_codecs.encode", text("x"), text("latln1")),
                 b"(t(t(t", b"X\xff\xff\xff\x7fx", b"\xff"):
        one_line(archive(path, program(body)))
    for value in ([1, 2], {"a": 1}, {"state_dict": {}}, {"state_dict": 5}, "text", {1: {}}):
        torch.save(value, path)
        assert "holds no tensors by name" in one_line(path)


def test_zip_bombs_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10_000_000)
        file.writestr("archive/version", "3\n")
    assert "compressed zip file" in one_line(path)


def test_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    """One that claims more elements than the file has: refused, not read from beyond."""
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.zeros(5)}, path)
    with zipfile.ZipFile(path) as file:
        entries = {entry: file.read(entry) for entry in file.namelist()}
    name = next(entry for entry in entries if entry.endswith("data.pkl"))
    assert entries[name].count(b"K\x05") == 2
    entries[name] = entries[name].replace(b"K\x05", b"J\xff\xff\xff\x0f")
    with zipfile.ZipFile(path, "w") as file:
        for entry, content in entries.items():
            file.writestr(entry, content)
    one_line(path)


def test_tensors_without_plain_elements_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.zeros(2), "sparse": torch.eye(2).to_sparse(), "meta": torch.empty(2, device="meta")}, path)
    assert set(weights_in(load_pickle(path), path)[0]) == {"a"}
