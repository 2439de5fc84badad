"""A demo that takes seconds: a base with random weights, a reader that knows its answers, few and small pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from impasto.evaluation.demo import run_demo
from impasto.evaluation.demo_result import DemoResult
from impasto.evaluation.lesson import Amounts
from tests.checkpoints import write_checkpoint
from tests.evaluation import stub_reader

AMOUNTS = Amounts(new=4, old=3, steps=2, renders=3, shown=2, shown_old=2)
OVERRIDES = ["data.resolution=64", "method.rank=2", "train.steps=4", "train.batch_size=2", "train.device=cpu",
             "sample.every=2", "sample.steps=2", "output.checkpoint_every=2"]


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini", layout="diffusers")


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What stands for the reader's module."""
    made = stub_reader.module()
    monkeypatch.setitem(sys.modules, "impasto.evaluation.reader", made)
    return made


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all small demos share: they look at the same pictures."""
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture
def small_demo(random_base: Path, encoded: Path, reader: ModuleType, own_cache: Path,
               monkeypatch: pytest.MonkeyPatch) -> Callable[..., DemoResult]:
    """`run_demo` on the random base; further overrides go on top."""
    monkeypatch.setenv("IMPASTO_CACHE", str(encoded))

    def run(lesson: str, folder: Path, *rest: Any, overrides: tuple[str, ...] = (), **named: Any) -> DemoResult:
        return run_demo(lesson, folder, *rest, amounts=AMOUNTS,
                        overrides=[f"base.path={random_base}", *OVERRIDES, *overrides], **named)

    return run
