"""`impasto demo`: what it prints, and how it ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from impasto.cli import app
from impasto.core.errors import UserError
from impasto.evaluation import demo as demo_module
from impasto.evaluation.demo import Stopped
from impasto.evaluation.demo_result import DemoResult, Score, Scores

SCORES = Scores(Score(0, 16), Score(15, 16), Score(14, 16), Score(24, 24), Score(23, 24))


def result(folder: Path) -> DemoResult:
    return DemoResult("mascot", 0, folder / "mascot.safetensors", folder / "report.html", SCORES, 2**20,
                      {"training": 40.0, "reading": 21.5}, 900 * 2**20)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        app.main(["demo", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple]]:
    """`called(outcome)`: from now on `run_demo` notes its arguments and gives that, or raises it."""
    def stand_in(outcome: Any) -> list[tuple]:
        calls: list[tuple] = []

        def run_demo(lesson: str, folder: Path, seed: int, report: object, *, force: bool) -> Any:
            calls.append((lesson, folder, seed, force))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(demo_module, "run_demo", run_demo)
        return calls

    return stand_in


def test_the_figures_and_then_the_page(called: Callable[..., list[tuple]], capsys: pytest.CaptureFixture[str]) -> None:
    calls = called(result(Path("impasto-demo")))
    assert run() == 0
    shown = capsys.readouterr().out.splitlines()
    assert calls == [("mascot", Path("impasto-demo"), 0, False)]
    assert shown[0].endswith("0 of 16 pictures before, 15 of 16 after") and "1:02" in shown[-2]
    assert shown[-1] == str(Path("impasto-demo/report.html"))


def test_options_reach_it(called: Callable[..., list[tuple]], tmp_path: Path) -> None:
    calls = called(result(tmp_path))
    assert run("--style", "-o", tmp_path, "--seed", 3, "--force") == 0
    assert calls == [("style", tmp_path, 3, True)]


def test_json(called: Callable[..., list[tuple]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called(result(tmp_path))
    assert run("--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recognised_after"] == 15 / 16 and told["lost"] == pytest.approx(1 / 24)
    assert told["seconds"] == 61.5 and told["report"] == str(tmp_path / "report.html")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_stopped_in_training(options: list[str], called: Callable[..., list[tuple]],
                             capsys: pytest.CaptureFixture[str]) -> None:
    called(Stopped(40, signal.SIGINT))
    assert run(*options) == 130
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"stopped_after": 40} if options else "the same command goes on" in shown


def test_what_the_user_can_mend_is_one_line(called: Callable[..., list[tuple]],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    called(UserError("is in use", where="impasto-demo"))
    assert run() == 1
    assert "error: impasto-demo: is in use" in capsys.readouterr().err


def test_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("impasto.mini.BASE", tmp_path / "none")
    assert run("-o", tmp_path / "demo") == 1
    assert "lacks the embedded base's weights" in capsys.readouterr().err and not (tmp_path / "demo").exists()
