"""Ready recipes learn as they did: loss curves of short runs on the embedded base."""

from __future__ import annotations

import json

import pytest

from tests.mini.weights import needs_base
from tests.training.golden import RUNS, STEPS, curve, golden


@pytest.mark.slow
@needs_base
@pytest.mark.parametrize("name", RUNS)
def test_a_run_follows_its_curve(name: str) -> None:
    if not golden(name).exists():
        pytest.skip("the curve has not been made: python -m tests.training.golden")
    kept = json.loads(golden(name).read_text(encoding="utf-8"))
    assert (kept["recipe"], kept["changes"]) == RUNS[name] and len(kept["losses"]) == STEPS
    assert curve(name) == pytest.approx(kept["losses"], rel=1e-3)
