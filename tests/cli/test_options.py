from __future__ import annotations

from pathlib import Path

import pytest
import typer

from impasto.cli.options import picture_size, refuse_existing, weighted
from impasto.core.errors import UserError


@pytest.mark.parametrize(("text", "expected"), [
    ("dog.safetensors", ("dog.safetensors", 1.0)),
    ("dog.safetensors:0.8", ("dog.safetensors", 0.8)),
    ("dog.safetensors:.5", ("dog.safetensors", 0.5)),
    ("dog.safetensors:-1", ("dog.safetensors", -1.0)),
    ("dog.safetensors:2.", ("dog.safetensors", 2.0)),
    (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
    (r"C:\loras\a.safetensors:0.8", (r"C:\loras\a.safetensors", 0.8)),
    ("C:a", ("C:a", 1.0)),
    ("a:b:0.5", ("a:b", 0.5)),
    ("dog:1e-3", ("dog:1e-3", 1.0)),
    ("dog:nan", ("dog:nan", 1.0)),
    (":0.5", (":0.5", 1.0)),
    ("a\nb:0.5", ("a\nb", 0.5)),
])
def test_a_weight_is_a_trailing_number_only(text, expected) -> None:
    assert weighted(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("512x768", (512, 768)), ("512X768", (512, 768)), ("512×768", (512, 768)), (" 64 ", (64, 64)),
])
def test_sizes(text, expected) -> None:
    assert picture_size(text) == expected


@pytest.mark.parametrize("text", ["", "x", "512x", "axb", "512x768x3", "-8x8", "1.5x2"])
def test_bad_sizes(text) -> None:
    with pytest.raises(typer.BadParameter, match="512x768"):
        picture_size(text)


def test_what_exists_is_refused_without_force(tmp_path: Path) -> None:
    there = [tmp_path / "a", tmp_path / "b"]
    for path in there:
        path.touch()
    with pytest.raises(UserError, match=r"a: is there already \(and 1 more\); .*--force"):
        refuse_existing([tmp_path / "new", *there], force=False)
    refuse_existing(there, force=True)
    refuse_existing([tmp_path / "new"], force=False)
