from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import impasto


@pytest.mark.parametrize("name", impasto._PUBLIC)
def test_each_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(impasto, name)
    assert thing.__name__ == name and thing.__module__ == impasto._PUBLIC[name]
    assert thing.__doc__
    assert name in dir(impasto)


def test_type_checkers_are_told_the_same_names() -> None:
    tree = ast.parse(Path(impasto.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    told = {alias.asname: node.module for node in imports for alias in node.names}
    assert told == impasto._PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode_base'"):
        impasto.lode_base  # noqa: B018


def test_importing_costs_nothing() -> None:
    code = "import sys; before = set(sys.modules); import impasto; print(len(set(sys.modules) - before))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(shown.stdout) < 10
