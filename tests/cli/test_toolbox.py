"""The verbs of the toolbox, as users call them: on the embedded base's kind of checkpoint, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from impasto.cli.arithmetic import bytes_in
from impasto.core.errors import UserError
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.cli.running import impasto, one_line
from tests.formats.adapter_cases import random_adapter
from tests.formats.checkpoint_cases import tensors_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    write_checkpoint(made / "base.safetensors")
    for i in (1, 2):
        save_adapter(random_adapter(seed=i), made / f"{i}.safetensors", dtype=torch.float32)
    return made


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    """Merge, extract, mix, resize, convert, each from what the one before left."""
    base, one, two = folder / "base.safetensors", folder / "1.safetensors", folder / "2.safetensors"
    made = impasto("merge", base, f"{one}:0.5", two, "-o", tmp_path / "merged.safetensors",
                   "--blocks", "text_encoder=0")
    assert made.returncode == 0 and "merged.safetensors, 17 layers changed" in made.stdout, made
    made = impasto("extract", base, tmp_path / "merged.safetensors", "--rank", 12, "-o", tmp_path / "x.safetensors",
                   "--json", "--dtype", "fp32")
    told = json.loads(made.stdout)
    assert len(told["layers"]) == 17 and told["error"] < 1e-3 and told["files"][0]["bytes"] > 0, made
    found = load_adapter(tmp_path / "x.safetensors")
    for layer in found.layers:
        wanted = 0.5 * load_adapter(one).dense(layer) + load_adapter(two).dense(layer)
        torch.testing.assert_close(found.dense(layer), wanted, rtol=1e-3, atol=1e-3)
    made = impasto("mix", one, f"{two}:-1", "-o", tmp_path / "mix.safetensors", "--size", "40kB", "--layers")
    assert "layers at rank" in made.stdout and "unet.conv_in" in made.stdout, made
    assert (tmp_path / "mix.safetensors").stat().st_size < 60_000
    made = impasto("resize", tmp_path / "mix.safetensors", "--energy", 0.9, "--by", "ratio",
                   "-o", tmp_path / "r.safetensors")
    assert made.returncode == 0 and "is lost (Frobenius norm)" in made.stdout, made
    made = impasto("convert", tmp_path / "r.safetensors", "--to", "peft", "-o", tmp_path / "peft")
    assert made.returncode == 0 and (tmp_path / "peft").is_dir(), made
    made = impasto("convert", tmp_path / "merged.safetensors", "-o", tmp_path / "out")
    assert made.returncode == 0 and (tmp_path / "out" / "model_index.json").exists(), made
    one_, other = (tensors_of(open_checkpoint(tmp_path / name)) for name in ("merged.safetensors", "out"))
    assert all(torch.equal(one_[name], other[name]) for name in one_)


def test_checkpoints_are_merged(folder: Path, tmp_path: Path) -> None:
    base, other = folder / "base.safetensors", write_checkpoint(tmp_path / "other.safetensors", seed=1)
    made = impasto("merge", base, other, "--weights", ".7,.3", "-o", tmp_path / "sum.safetensors")
    assert made.returncode == 0 and "tensors changed" in made.stdout, made
    made = impasto("merge", base, other, base, "--add-difference", 1, "-o", tmp_path / "same.safetensors")
    one, two = (tensors_of(open_checkpoint(path)) for path in (tmp_path / "same.safetensors", other))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one), made


@pytest.mark.parametrize("arguments, line", [
    (["merge", "base.safetensors", "base.safetensors", "-o", "out.safetensors"], "say --weights"),
    (["merge", "base.safetensors", "1.safetensors", "-o", "base.safetensors", "--force"], "is one of the inputs"),
    (["mix", "1.safetensors", "-o", "2.safetensors"], "is there already"),
    (["mix", "1.safetensors", "-o", "out.safetensors", "--rank", "3", "--energy", "0.5"], "rank and energy"),
    (["resize", "1.safetensors", "--size", "big", "-o", "out.safetensors"], "big: is no size"),
    (["extract", "base.safetensors", "base.safetensors", "--rank", "4", "-o", "out.safetensors"],
     "no layer that differs"),
    (["convert", "1.safetensors", "--to", "ldm", "-o", "out.safetensors"], "layout of checkpoints"),
    (["extract", "mini", "base.safetensors", "--rank", "4", "-o", "out.safetensors"],
     "compare checkpoints of one kind"),
])
def test_what_cannot_be_is_one_line(arguments: list[str], line: str, folder: Path) -> None:
    assert line in one_line(impasto(*arguments, cwd=folder))
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize("arguments", [
    ["resize", "a.safetensors", "-o", "b.safetensors"], ["extract", "a", "b", "-o", "c.safetensors"],
    ["extract", "a", "b", "--kind", "loha", "--rank", "2", "-o", "c"], ["merge", "a", "b", "--weights", "x", "-o", "c"],
    ["merge", "a", "b", "--add-difference", "1", "-o", "c"], ["mix", "a", "-o", "b", "--dtype", "int8"],
])
def test_wrong_use(arguments: list[str]) -> None:
    assert impasto(*arguments).returncode == 2


@pytest.mark.parametrize("text, size", [("40MB", 40_000_000), ("1.5 GiB", 3 * 2**29), ("100", 100), (".5k", 500)])
def test_sizes(text: str, size: int) -> None:
    assert bytes_in(text) == size
    with pytest.raises(UserError):
        bytes_in(text + "x")
