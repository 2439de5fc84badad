from __future__ import annotations

import io

import pytest

from impasto.cli import console
from impasto.cli.console import Pace, RichReporter, can_show, duration, size
from impasto.cli.drawings import bar, bars, safe, short, table


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.2, "1:05"), (59.6, "1:00"), (7267, "2:01:07")])
def test_durations(seconds, text) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1023 * 1024, "1023 KiB"),
                                             (3.97 * 2**30, "3.97 GiB"), (2**41, "2048 GiB")])
def test_sizes(count, text) -> None:
    assert size(count) == text


def test_the_time_left_is_that_of_the_steps_still_to_go(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace(100, "steps")
    assert str(pace) == "0/100 steps"
    clock.now += 40
    pace.advance(50, "")  # a resumed run: these were not done now
    clock.now += 10
    pace.advance(5, "loss 0.1")
    assert pace.rate == pytest.approx(0.5)
    assert str(pace) == "55/100 steps, 2 s each, 1:30 left, loss 0.1"
    clock.now += 0.5
    pace.advance(16, "")  # the last status stays
    assert str(pace) == "71/100 steps, 2/s, 0:14 left, loss 0.1"
    assert pace.summary() == "71 steps in 0:50"


def test_without_a_total_there_is_no_forecast(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace(None, "files")
    clock.now += 3
    assert str(pace) == "0:03"
    pace.advance(2, "")
    assert str(pace) == "2 files, 0:03"


def test_in_a_pipe_progress_is_plain_lines_now_and_then(monkeypatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    report = RichReporter(stream)
    with report.phase("training", 1000, "steps") as advance:
        for _ in range(1000):
            clock.now += 1
            advance(1, "loss 0.5")
        report.note("a note")
        report.warn("a warning")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training ..."
    assert lines[1] == "training: 10/1000 steps, 1/s, 16:30 left, loss 0.5"
    assert lines[-3:] == ["a note", "warning: a warning", "training: 1000 steps in 16:40"]
    assert 20 < len(lines) < 100  # more and more rarely
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_short_phase_leaves_one_line(monkeypatch) -> None:
    Clock(monkeypatch)
    stream = io.StringIO()
    with RichReporter(stream).phase("loading") as advance:
        advance()
    assert stream.getvalue() == "loading ...\n"


@pytest.mark.parametrize("columns", ["40", "120"])
def test_on_a_terminal_phases_are_bars_and_may_nest(monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    report = RichReporter(stream)
    with report.phase("training", 3, "steps") as advance:
        for _ in range(3):
            advance(1, "loss [0.5]")
        with report.phase("a preview with quite a long title"):
            report.note("[bold]as it stands[/bold] " + "long " * 30)
    text = stream.getvalue()
    assert "training" in text and "preview" in text
    assert "[bold]as it stands[/bold] " + "long " * 30 in text  # neither markup nor wrapped
    assert report._bars is None
    with report.phase("again"):
        pass


def test_an_error_in_a_phase_takes_the_bars_away() -> None:
    report = RichReporter(Terminal())
    with pytest.raises(ValueError), report.phase("failing"):
        raise ValueError
    assert report._bars is None


@pytest.mark.parametrize(("environment", "live"), [({"TERM": "dumb"}, False), ({"TERM": "xterm"}, True)])
def test_a_dumb_terminal_gets_lines(monkeypatch, environment, live) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert RichReporter(Terminal()).live is live


def test_no_color_is_heeded(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with RichReporter(stream).phase("training", 2, "steps") as advance:
        advance()
    assert "\x1b[3" not in stream.getvalue()  # neither foreground colours nor bright ones


def test_what_a_code_page_can_show() -> None:
    latin = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    assert can_show("é", latin) and not can_show("█", latin)


def test_bars_are_to_scale() -> None:
    assert bar(1, 4, ascii_only=False) == "████"
    assert bar(0.5, 4, ascii_only=False) == "██"
    assert bar(0.53125, 4, ascii_only=False) == "██▏"
    assert bar(0, 4, ascii_only=False) == ""
    assert bar(0.5, 4, ascii_only=True) == "##"
    assert bar(7, 4, ascii_only=True) == "####"


def test_bars_fit_a_narrow_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = bars({"unet down 0": 1.0, "unet mid": 0.25})
    assert max(map(len, lines)) <= 40
    assert bars({}) == []
    assert bars({"nothing": 0.0})[0].split() == ["nothing", "0"]


def test_a_table_is_aligned() -> None:
    assert table([["a", "1"], ["bcd", "100"]]) == ["a      1", "bcd  100"]


def test_a_file_cannot_command_the_terminal() -> None:
    assert safe("a\x1b[2Jb\nc\x07\u202e") == "a?[2Jb c??"
    assert short("x" * 20, 10) == "xxxxxxx..."
