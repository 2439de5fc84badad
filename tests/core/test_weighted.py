"""FILE:strength, as people write it."""

from __future__ import annotations

import pytest

from impasto.core.weighted import Weighted


@pytest.mark.parametrize(("text", "path", "strength"), [
    ("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.8", "a.safetensors", 0.8), ("a:-.5", "a", -0.5),
    (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0), (r"C:\a.safetensors:2", r"C:\a.safetensors", 2.0),
    ("a:1e-1", "a:1e-1", 1.0), ("a:b", "a:b", 1.0), ("a:", "a:", 1.0),
])
def test_only_a_number_at_the_end_is_a_strength(text: str, path: str, strength: float) -> None:
    assert Weighted.parse(text) == (path, strength)


@pytest.mark.parametrize("text", ["", ":0.5", " :1", "a:" + "9" * 400])
def test_what_names_no_file_or_no_strength(text: str) -> None:
    with pytest.raises(ValueError, match="names no file|strength"):
        Weighted.parse(text)
