from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.pace import cases, seconds, told
from impasto.cli import app, doctor
from impasto.core.errors import UserError
from impasto.planning import time as pace
from impasto.planning.cards import card_of
from impasto.planning.forecast import Forecast
from impasto.planning.time import Speed, about, calibrate, kept, seconds_per_step, speed_here, speed_of

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of miniature layers, at once."""
    monkeypatch.setattr(pace, "LEVELS", ((32, 8), (32, 4), (64, 4)))


def test_a_step_is_the_sum_of_both_times() -> None:
    speed = Speed("a card", "fp16", flops=2e12, bandwidth=1e11, measured=True)
    forecast = Forecast({}, "", 0, {"forward": 1e12, "backward": 2e12, "again": 1e12}, traffic=3e10)
    assert seconds_per_step(forecast, speed) == pytest.approx(4 / 2 + 0.3)
    assert seconds_per_step(Forecast({}, "", 0), speed) is None


def test_a_card_that_nobody_measured_has_an_assumed_speed() -> None:
    card = card_of("RTX 3060")
    speed = speed_of(card, "bf16")
    assert speed is not None and not speed.measured and "assumed: 40%" in speed.origin
    assert speed.flops == pytest.approx(0.4 * 25.5e12) and speed.bandwidth == pytest.approx(0.7 * 360e9)
    assert speed_of(card_of("T4"), "bf16") is None and speed_of(card_of("12GiB"), "fp16") is None


def test_a_card_that_was_measured_here_has_that_speed(own_cache: Path) -> None:
    here = Speed("NVIDIA GeForce RTX 3060", "bf16", 9e12, 2e11, measured=True)
    pace._keep(here)
    assert speed_of(card_of("RTX 3060"), "bf16") == here
    for card, precision in (("RTX 3060", "fp16"), ("RTX 3060 8GB", "bf16"), ("RTX 3070", "bf16")):
        speed = speed_of(card_of(card), precision)
        assert speed is not None and not speed.measured


def test_a_plan_for_this_machines_processor_takes_its_speed(own_cache: Path, capsys: pytest.CaptureFixture) -> None:
    settings = ["mini/lora", "data.folder=", "train.device=cpu", "train.steps=10", "sample.every=0"]
    with pytest.raises(SystemExit):
        app.main(["plan", *settings])
    assert "a step" not in capsys.readouterr().out  # nobody knows
    pace._keep(Speed(pace.name_of(CPU), "fp32", 1e9, 1e9, measured=True))
    with pytest.raises(SystemExit):
        app.main(["plan", *settings])
    assert "a step" in (out := capsys.readouterr().out) and "for 10 steps (measured here)" in out


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0834, "0.083 s"), (0.8, "0.8 s"), (40.2, "40 s"), (59.7, "1 min"), (61, "1 min"), (720, "12 min"),
    (3569, "59 min"), (3580, "1 h"), (3600, "1 h"), (7800, "2 h 10 min"), (86399, "24 h"), (86400, "1 d"),
    (86400 * 3 + 4 * 3600, "3 d 4 h")])
def test_times_are_told_as_people_do(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_what_is_measured_is_kept(small: None, own_cache: Path) -> None:
    assert kept() == [] and list(doctor._speeds()) == []
    speed = calibrate(CPU, "fp32", each=0)
    assert speed.measured and speed.flops > 1e7 and speed.bandwidth > 1e7
    assert kept() == [speed] and speed_here(CPU, "fp32") == speed and speed_here(CPU, "bf16") is None
    again = calibrate(CPU, each=0)  # auto is fp32 here
    assert kept() == [again]
    (finding,) = doctor._speeds()
    assert "fp32" in finding.text and "FLOPS" in finding.text
    (own_cache / "speed.json").write_text("{")
    assert kept() == []


def test_a_known_cards_share_is_told(own_cache: Path) -> None:
    pace._keep(Speed("NVIDIA GeForce RTX 4090", "bf16", 82.6e12, 504e9, measured=True))
    (finding,) = doctor._speeds()
    assert "82.6 TFLOPS in products (50% of the card's 165.2), 504 GB/s in the rest (50% of 1008)" in finding.text


def test_doctor_measures_when_it_is_asked_to(small: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pace, "EACH", 0.0)
    doctor._calibrate("cpu", "fp32")
    assert len(kept()) == 1
    with pytest.raises(UserError, match="no precision 'fp8'"):
        doctor._calibrate("cpu", "fp8")


def test_the_measured_operations_are_counted_right(small: None) -> None:
    """Against torch's own counter, which knows no backward of attention by matrices; so each but that."""
    from torch.utils.flop_counter import FlopCounterMode

    for _, flops, run in list(pace._products(CPU, torch.float32))[:-1]:
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == flops


@pytest.mark.slow
def test_a_step_takes_about_what_is_told() -> None:
    """Of SD 1.5's blocks, within a factor of 3 either way, on a machine that others use too; not of the miniature,
    whose operations are so short that starting them counts."""
    speed = calibrate(CPU, "fp32", each=0.5)
    for name, run in cases(large=False).items():
        if name.startswith("miniature"):
            continue
        measured, (forecast, _) = seconds(run, 3), told(run, speed)
        assert forecast / 3 < measured < forecast * 3, name
