"""Fingerprints agree over layouts, and change with the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.families import fingerprint as module
from impasto.families.fingerprint import fingerprint, of_module, of_tensors
from impasto.families.load import load_base
from impasto.families.sd1 import SD1
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.header import read_header
from tests.families.conftest import random_sd1


def test_layouts_agree(base: SD1, file: Path) -> None:
    assert base.fingerprint() == load_base(file).fingerprint()
    assert base.fingerprint(["vae"]) == {"vae": base.fingerprint()["vae"]}
    assert len(set(base.fingerprint().values())) == 3


def test_precision_of_use_does_not_count(file: Path) -> None:
    assert load_base(file, dtype=torch.bfloat16).fingerprint() == load_base(file).fingerprint()


def test_weights_in_memory_agree_with_the_file(base: SD1) -> None:
    assert {name: of_module(m) for name, m in base.components.items()} == base.fingerprint()
    assert random_sd1().fingerprint() != base.fingerprint()


def test_order_and_position_ids_do_not_count() -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.zeros(2, 2), "x.position_ids": torch.arange(5)}
    rest = dict(reversed(list(tensors.items())[:2]))
    assert of_tensors(tensors.items()) == of_tensors(rest.items())
    changes = [{"a": torch.zeros(4)}, {"a": torch.zeros(2, 2).half()}, {"a": torch.tensor([[0.0, 0], [0, -0.0]])},
               {"c": torch.zeros(1)}]
    assert len({of_tensors((rest | change).items()) for change in [{}, *changes]}) == 5


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(1000)}
    whole = of_tensors(tensors.items())
    monkeypatch.setattr(module, "_CHUNK", 64)
    assert of_tensors(tensors.items()) == whole


def test_remembered_until_the_file_changes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "copy.safetensors"
    tensors, metadata = load_file(file), read_header(file).metadata
    save_file(tensors, path, metadata)
    reads: list[str] = []
    monkeypatch.setattr(module, "of_tensors", lambda pairs: reads.append("read") or of_tensors(pairs))
    first = fingerprint(open_checkpoint(path), "unet")
    assert fingerprint(open_checkpoint(path), "unet") == first and reads == ["read"]
    changed = next(key for key in tensors if "out.2.bias" in key)
    path.unlink()
    save_file(tensors | {changed: tensors[changed] + 1}, path, metadata)
    assert fingerprint(open_checkpoint(path), "unet") != first and len(reads) == 2
    assert fingerprint(open_checkpoint(path), "vae") == fingerprint(open_checkpoint(file), "vae")
