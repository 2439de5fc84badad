"""What is passed on to an optimizer is an argument of its class."""

from __future__ import annotations

import inspect

import pytest

from impasto.training.foreign.optimizer_options import ARGUMENTS, OWN_DEFAULTS
from impasto.training.optimizers import OPTIMIZERS, SHARED, _load


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_those_of_the_class(name: str) -> None:
    entry = OPTIMIZERS[name]
    pytest.importorskip(entry.path.partition(":")[0])
    taken = inspect.signature(_load(entry.unpaged or entry.path, entry.extra)).parameters
    assert set(ARGUMENTS[name]) <= set(taken) - {"params", "lr", *SHARED}
    for key, value in OWN_DEFAULTS.get(name, {}).items():
        assert taken[key].default == value and entry.settings[key] != value
