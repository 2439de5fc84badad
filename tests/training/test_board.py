"""Curves as TensorBoard itself reads them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from impasto.training.board import Board


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def sitting(folder: Path, first: int, last: int, value: float) -> None:
    board = Board(folder, first)
    for step in range(first + 1, last + 1):
        board.add(step, loss=value, rate=step / 8)
    board.close()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    sitting(tmp_path, 0, 5, 0.5)
    sitting(tmp_path, 3, 6, 0.25)
    assert read(tmp_path, "loss") == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25), (5, 0.25), (6, 0.25)]
    assert read(tmp_path, "rate")[-1] == (6, 0.75)


def test_what_is_written_outlives_a_kill(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.add(1, loss=0.5)
    assert read(tmp_path, "loss") == [(1, 0.5)]
    board.close()


@pytest.mark.parametrize("jump", [-1e6, 0.0, 1e6])
def test_the_last_sitting_comes_last_whatever_the_clock_says(tmp_path: Path, jump: float,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    sitting(tmp_path, 0, 4, 0.5)
    now = time.time() + jump
    monkeypatch.setattr(time, "time", lambda: now)
    sitting(tmp_path, 2, 4, 0.25)
    sitting(tmp_path, 3, 4, 0.125)
    assert read(tmp_path, "loss") == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.125)]
