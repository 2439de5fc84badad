"""User errors are one line: what, where, what to do."""

from __future__ import annotations

import pytest

from impasto.core.errors import MissingExtra, UserError, nearest
from impasto.core.registry import Registry


def test_the_line_has_what_where_and_fix() -> None:
    line = str(UserError("is empty", where="photos", fix="put pictures in it"))
    assert line == "photos: is empty; put pictures in it"
    assert str(UserError("is empty")) == "is empty"


def test_nearest_names_the_closest_or_all() -> None:
    assert nearest("lerning_rate", ["learning_rate", "steps"]) == "did you mean 'learning_rate'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


def test_a_missing_extra_is_named() -> None:
    assert "pip install 'impasto[8bit]'" in str(MissingExtra("bitsandbytes", "8bit"))


def test_registry_resolves_at_use_and_names_the_nearest() -> None:
    registry = Registry("shape", {"ordered": "collections:OrderedDict", "broken": "no.such.module:X"})
    assert registry.get("ordered").__name__ == "OrderedDict"
    assert list(registry) == ["ordered", "broken"]
    with pytest.raises(UserError, match="unknown shape 'orderd'; did you mean 'ordered'"):
        registry.get("orderd")
