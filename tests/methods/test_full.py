"""Full fine-tuning: what trains is what is named, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.methods.full import Full
from tests.families.conftest import random_sd1


def full(**options: Any) -> Full:
    return Full(Full.Options.model_validate({"kind": "full", **options}))


@pytest.mark.parametrize(("parts", "paths"), [
    (["unet"], ["unet"]), (["text-encoder"], ["text_encoder"]), (["vae"], ["vae"]),
    (["vae-decoder"], ["vae.decoder", "vae.post_quant_conv"]), (["vae", "vae-decoder"], ["vae"]),
    (["unet", "text-encoder"], ["unet", "text_encoder"]),
])
def test_parts(parts: list[str], paths: list[str]) -> None:
    base, method = random_sd1(), full(parts=parts)
    trains = method.trains(base)
    groups = method.prepare(base, seed=0)
    assert trains == {path.split(".")[0] for path in paths}
    assert sorted(method.modules()) == sorted(paths)
    expected = {id(p) for path in paths for p in base.layer(path).parameters()} if "." in paths[0] else \
        {id(p) for path in paths for p in base.components[path].parameters()}
    assert {id(p) for group in groups for p in group["params"]} == expected
    training = {id(p) for module in base.components.values() for p in module.parameters() if p.requires_grad}
    assert training == expected


def test_trained_weights_are_fp32_whatever_the_rest_is() -> None:
    base = random_sd1()
    base.components["unet"].to(torch.bfloat16)
    full().prepare(base, seed=0)
    assert {p.dtype for p in base.denoiser.parameters()} == {torch.float32}


def test_the_text_encoder_has_its_own_rate() -> None:
    groups = full(parts=["unet", "text-encoder"], text_encoder_learning_rate=1e-6).prepare(random_sd1(), seed=0)
    assert [group["lr"] for group in groups] == [None, 1e-6]
    with pytest.raises(UserError, match="no text encoder is trained"):
        full(text_encoder_learning_rate=1e-6).prepare(random_sd1(), seed=0)
