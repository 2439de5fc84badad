"""What is asked of a run while it trains."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from impasto.training import trainer
from impasto.training.recipe import Recipe
from impasto.training.requests import Requests
from impasto.training.trainer import train

RecipeMaker = Callable[..., Recipe]


def during(step: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of a step (counted from 0)."""
    original = trainer.Trainer._accumulate

    def wrapped(self: trainer.Trainer, now: int) -> float:
        if now == step:
            action()
        return original(self, now)

    patch.setattr(trainer.Trainer, "_accumulate", wrapped)


def test_a_file_asks_once(tmp_path: Path) -> None:
    with Requests.listening(tmp_path) as requests:
        assert requests.take() == frozenset()
        (tmp_path / "save").touch()
        (tmp_path / "preview").touch()
        assert requests.take() == {"save", "preview"}
        assert requests.take() == frozenset() and not list(tmp_path.iterdir())


def test_save_and_preview_now(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(sample={"every": 100, "steps": 2, "prompts": ["sks dog"]},
                  output={"checkpoint_every": 100, "keep": 9})
    folder = Path(made.output.dir)
    during(2, lambda: [(folder / name).touch() for name in ("save", "preview")] and None, monkeypatch)
    train(made)
    assert (folder / "dog-000003.safetensors").exists() and (folder / "previews" / "000003-0.png").exists()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000003", "000006"]


def test_a_stop_is_exact(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe()
    with monkeypatch.context() as patch:
        during(2, (Path(made.output.dir) / "stop").touch, patch)
        outcome = train(made)
    assert outcome.step == 3 and outcome.stopped_by is not None and outcome.artifact is None
    assert train(made).resumed_from == 3
    straight = recipe("straight")
    train(straight)
    a, b = (Path(r.output.dir) / "checkpoints" / "000006" / "state.safetensors" for r in (made, straight))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
def test_a_signal_saves_and_the_run_goes_on(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(output={"checkpoint_every": 100, "keep": 9})
    during(1, lambda: os.kill(os.getpid(), signal.SIGUSR1), monkeypatch)
    assert train(made).step == 6
    assert (Path(made.output.dir) / "dog-000002.safetensors").exists()
