"""An adapter on a base: its effect, and the errors and the notice of one made for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.layers import shape_of
from impasto.deltas.lowrank import LowRank
from impasto.families.apply import apply, notices
from impasto.families.sd1 import SD1
from tests.families.conftest import random_sd1
from tests.heard import Heard


def adapter(on: SD1, **changes: Any) -> Adapter:
    torch.manual_seed(0)
    deltas = {}
    for path in [*on.targets("cross-attention"), *on.targets("text-encoder")]:
        out, into = shape_of(on.layer(path))
        deltas[path] = (LowRank.from_factors(torch.randn(out, 2), torch.randn(2, into)),)
    return Adapter(**{"deltas": deltas, "family": "sd1", "base": on.fingerprint(), **changes})


@torch.no_grad()
def test_effect_is_that_of_merged_weights() -> None:
    base = random_sd1()

    def prediction() -> torch.Tensor:
        text = base.encode_text(["a cat"])
        return base.predict(torch.ones(1, 4, 8, 8), torch.tensor([9]), base.condition(text))

    before, given = prediction(), adapter(base)
    with apply(base, given, 0.5):
        during = prediction()
    assert torch.equal(prediction(), before)
    for path in given.layers:
        base.layer(path).weight += 0.5 * given.dense(path)
    torch.testing.assert_close(during, prediction(), rtol=1e-4, atol=1e-4)
    assert (during - before).abs().max() > 1e-2


def test_another_family(base: SD1) -> None:
    with pytest.raises(UserError, match="the adapter is for sdxl, the base is sd1"):
        apply(base, adapter(base, family="sdxl"))
    apply(base, adapter(base, family="")).detach()  # a file that does not tell


def test_another_shape_names_the_layer_and_both(base: SD1) -> None:
    path = base.targets("attention")[0]
    wrong = Adapter({path: (LowRank((5, 6), 2),)}, family="sd1")
    with pytest.raises(UserError, match=rf"{path}.*\(32, 32\).*\(5, 6\)"):
        apply(base, wrong)


def test_a_layer_without_weights(base: SD1) -> None:
    wrong = Adapter({"unet.conv_act": (LowRank((5, 6), 2),)}, family="sd1")
    with pytest.raises(UserError, match="unet.conv_act: is a .*, which cannot carry a delta"):
        apply(base, wrong)


def test_unknown_layers(base: SD1) -> None:
    with pytest.raises(UserError, match="unet.no_such_layer"):
        apply(base, Adapter({"unet.no_such_layer": (LowRank((5, 6), 2),)}))
    with pytest.raises(UserError, match="text_encoder_2"):
        apply(base, Adapter({"text_encoder_2.layer": (LowRank((5, 6), 2),)}))


def test_another_checkpoint_is_one_line(base: SD1) -> None:
    heard = Heard()
    apply(base, adapter(base), report=heard).detach()
    assert not heard.notes
    other = adapter(base, base=base.fingerprint() | {"unet": "0" * 32, "vae": "1" * 32})
    apply(base, other, report=heard).detach()
    assert heard.notes == notices(base, other) == ["the adapter was made on another checkpoint of sd1 (unet)"]
    assert notices(base, adapter(base, base={})) == []
