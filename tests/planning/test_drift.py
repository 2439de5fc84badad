from __future__ import annotations

from pathlib import Path

import pytest

from impasto.cli import doctor
from impasto.planning.drift import record, seen


def test_nothing_is_said_before_the_first_run() -> None:
    assert seen() is None and list(doctor._forecasts()) == []


def test_the_median_and_the_worst(own_cache: Path) -> None:
    for run, measured in (("a", 1010), ("b", 1002), ("c", 900), ("d", 1000)):
        record(run, 1000, measured, {"device": "cpu"})
    drift = seen()
    assert drift is not None and (drift.count, drift.run) == (4, "c")
    assert drift.median == pytest.approx(0.001) and drift.worst == pytest.approx(-0.1)
    (finding,) = doctor._forecasts()
    assert finding.ok and "4 runs" in finding.text and "-10.0% at worst (c)" in finding.text
    assert len((own_cache / "forecasts.jsonl").read_text().splitlines()) == 4


def test_a_torn_line_is_passed_over(own_cache: Path) -> None:
    record("a", 1000, 1100)
    with open(own_cache / "forecasts.jsonl", "a") as file:
        file.write('{"run": "b", "forec\n[]\n{"run": "c", "forecast": 0, "measured": 1}\n')
        file.write('{"run": "d", "forecast": "x"}\n')
    record("e", 1000, 1100)
    drift = seen()
    assert drift is not None and drift.count == 2
    (finding,) = doctor._forecasts()
    assert not finding.ok and "+10.0%" in finding.text


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "file" / "cache"))
    record("a", 1, 1)
    assert seen() is None
