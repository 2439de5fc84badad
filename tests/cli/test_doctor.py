from __future__ import annotations

import json

from impasto.cli import doctor
from tests.cli.running import impasto


def test_the_report_for_machines(monkeypatch, capsys) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    doctor.doctor(as_json=True)
    report = json.loads(capsys.readouterr().out)
    names = [finding["name"] for finding in report["findings"]]
    assert {"Python", "memory", "cpu", "cache", "hub cache"} <= set(names)
    assert "HF_HUB_OFFLINE" in next(f["text"] for f in report["findings"] if f["name"] == "hub cache")
    assert report["ok"] == all(finding["ok"] for finding in report["findings"])


def test_the_report_for_people_goes_without_unicode() -> None:
    shown = impasto("doctor", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0
    assert all(line.startswith(("ok ", "!  ", "   ")) for line in shown.stdout.splitlines())


def test_a_full_disk_is_a_warning_with_advice(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**80)
    found = list(doctor._disk())
    assert not any(f.ok for f in found) and "IMPASTO_CACHE" in found[0].fix


def test_packages_are_held_against_what_impasto_asks_for(monkeypatch) -> None:
    versions = {"torch": "2.12.1", "rich": "13.0", "colorama": "1", "web-thing": None, "dev-thing": None}
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: [
        "torch>=2.11,<2.14", "rich>=14", "absent>=1", 'colorama>9; platform_system == "Nowhere"',
        'web-thing>=1; extra == "web"', 'dev-thing; extra == "dev"'])
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name))
    found = {f.name: f for f in doctor._packages()}
    assert list(found) == ["torch", "rich", "absent", "extra web"]
    assert [f.ok for f in found.values()] == [True, False, False, True]
    assert found["rich"].fix == "pip install 'rich>=14'"
    assert found["absent"].text == "missing"
    assert "pip install 'impasto[web]'" in found["extra web"].fix


def test_half_precision_is_measured() -> None:
    assert 0 < doctor.half_precision_gain(64) < 1000
    assert doctor._times(2.0) == "2 times faster" and doctor._times(0.05) == "20 times slower"
