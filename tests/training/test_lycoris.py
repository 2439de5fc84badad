"""Runs by LoHa and LoKr: stopped and resumed to the bit, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from impasto.formats.adapters import load_adapter
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.trainer import train
from tests.training.conftest import tree
from tests.training.test_resume import assert_equal, tensors

WAYS: dict[str, dict[str, Any]] = {
    "loha": {"kind": "loha", "rank": 2, "tucker": True},
    "lokr": {"kind": "lokr", "rank": 1, "decompose_both": True, "tucker": True},
    "lokr, full": {"kind": "lokr", "full": True, "factor": 4},
}


def recipe_of(way: str, mini: Path, photos: Path, out: Path, **sections: Any) -> Recipe:
    made = tree(mini, photos, out, **sections)
    return make_recipe({**made, "method": {**WAYS[way], "targets": ["attention", "convolutions", "text-encoder"]}})


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_resumed_is_bit_equal(way: str, mini: Path, photos: Path, tmp_path: Path) -> None:
    whole, stopped = (recipe_of(way, mini, photos, tmp_path / name) for name in ("whole", "stopped"))
    outcome = train(whole)
    assert train(stopped, stop_after=3).artifact is None
    assert train(stopped).resumed_from == 3
    assert_equal(tensors(whole.output.dir), tensors(stopped.output.dir))
    assert outcome.artifact is not None
    adapter = load_adapter(outcome.artifact)
    assert {term.kind for terms in adapter.deltas.values() for term in terms} == {WAYS[way]["kind"]}
    assert {path.partition(".")[0] for path in adapter.layers} == {"unet", "text_encoder"}
    assert all(term.weight().any() for terms in adapter.deltas.values() for term in terms)
