"""The proof of exact resume finds exactness where it is, and its lack where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from impasto.training import resume, trainer
from impasto.training.proof import STEPS, verify_resume
from impasto.training.recipe import Recipe


def test_a_run_is_exact(recipe: Callable[..., Recipe]) -> None:
    made = recipe(method={"dropout": 0.1}, train={"schedule": "cosine", "ema": 0.9})
    proof = verify_resume(made)
    assert proof.exact and proof.tensors > 20
    assert made.train.steps == 6 and made.output.dir.endswith("run")  # the recipe itself is as it was


def test_a_lost_optimizer_state_is_found(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "unpack_optimizer", lambda *args: None)
    proof = verify_resume(recipe())
    assert not proof.exact and any(name.startswith("method.") for name in proof.differing)


def test_a_draw_from_a_generator_of_its_own_is_found(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    generator = torch.Generator().manual_seed(0)
    original = trainer.step_losses

    def unclean(base, batch, objective, draws):
        return original(base, batch, objective, draws) * (1 + torch.rand((), generator=generator))

    monkeypatch.setattr(trainer, "step_losses", unclean)
    assert not verify_resume(recipe()).exact
    assert STEPS == 6
