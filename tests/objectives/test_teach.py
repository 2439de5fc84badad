"""Preservation without class pictures: against its formula, with a teacher that is the base to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.rng import Draws, generator
from impasto.diffusion.densities import Uniform
from impasto.families.sd1 import SD1
from impasto.methods import METHODS
from impasto.methods.base import all_off
from impasto.methods.lora import LoRA
from impasto.objectives.batch import Batch
from impasto.objectives.denoise import Denoise, DenoiseOptions
from impasto.objectives.teach import Teach, TeachOptions
from impasto.training.recipe import Recipe
from impasto.training.trainer import train
from tests.families.conftest import random_sd1
from tests.training.conftest import mini, photos, recipe
from tests.training.of_method import EVERY_METHOD, of_method

__all__ = ["mini", "photos", "recipe"]

CAPTIONS = ["a photo of sks dog", "sks dog"]


def pupil(targets: list[str], double: bool = True) -> tuple[SD1, LoRA]:
    """A base with a LoRA on it that has already moved."""
    base = random_sd1()
    if double:
        for module in base.components.values():
            module.double()
    for module in base.components.values():
        module.requires_grad_(False)
    method = LoRA(LoRA.Options(targets=targets, rank=2))
    method.prepare(base, 0)
    for path, delta in method.deltas.items():
        if double:
            delta.double()
        with torch.no_grad():
            delta.up.copy_(torch.randn(delta.up.shape, generator=generator(0, path)) * 0.1)
    return base, method


def batch(base: SD1, double: bool = True) -> Batch:
    moments = torch.randn(2, 8, 8, 8, generator=generator(0, "moments"))
    return Batch([0, 1], ["a", "b"], torch.ones(2), moments=moments, captions=CAPTIONS)


def teach(base: SD1, method: LoRA, **options: Any) -> Teach:
    objective = Teach(TeachOptions.model_validate({"caption": "a photo of a dog", **options}))
    objective.meet(base, lambda: all_off([method]), method.trains(base))
    return objective


@pytest.mark.parametrize("targets", [["attention"], ["attention", "text-encoder"]])
def test_loss_and_gradient_are_those_of_the_formula(targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base, method = pupil(targets)
    monkeypatch.setattr(SD1, "latents", lambda self, moments, noise: (moments.chunk(2, 1)[0] + noise).double())
    monkeypatch.setattr(Teach, "latents", staticmethod(lambda base, batch, draws: base.latents(
        batch.moments, draws.normal("latent", (4, 8, 8)))))
    given, draws = batch(base), Draws(0, 3, [0, 1])
    objective = teach(base, method, weight=0.7, weighting="min_snr", caption=["a dog", "a photo of a dog", "dogs"])
    got = objective.loss(base, given, draws)
    parameters = [p for delta in method.deltas.values() for p in delta.parameters()]
    gradient = torch.autograd.grad(got.sum(), parameters)

    # the formula, sample by sample, with the attachment switched by hand
    expected: list[Tensor] = []
    process = base.process
    for i in range(2):
        x0 = given.moments[i:i + 1, :4].double() + draws.normal("latent", (4, 8, 8))[i:i + 1]  # type: ignore[index]
        noise = draws.normal("noise", (4, 8, 8))[i:i + 1]
        time = process.times(draws.uniform("time"), Uniform())[i:i + 1]
        alpha, sigma = (value.double() for value in process.alpha_sigma(time))
        x_t = process.add_noise(x0, noise, time)
        words = ["a dog", "a photo of a dog", "dogs"][int(3 * draws.uniform("class caption")[i].item())]
        said, of_class = (base.predict(x_t, time, base.condition(base.encode_text([caption])))
                          for caption in (CAPTIONS[i], words))
        method.attachment.enabled = False
        with torch.no_grad():
            target = base.predict(x_t, time, base.condition(base.encode_text([words])))
        method.attachment.enabled = True
        snr = (alpha / sigma).square().item()
        loss = (said - noise).square().mean() + 0.7 * (of_class - target).square().mean()
        expected.append(loss * min(snr, 5) / snr)
        assert got[i].item() == pytest.approx(expected[-1].item(), rel=1e-6)
        assert (of_class - target).abs().max() > 1e-3  # there is something to keep
    by_hand = torch.autograd.grad(torch.stack(expected).sum(), parameters)
    for ours, theirs in zip(gradient, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)
        assert ours.any()


def test_without_weight_it_is_denoising() -> None:
    base, method = pupil(["attention"], double=False)
    draws = Draws(0, 0, [0, 1])
    plain = Denoise(DenoiseOptions()).loss(base, batch(base), draws)
    assert torch.equal(teach(base, method, weight=0).loss(base, batch(base), draws), plain)
    assert (teach(base, method).loss(base, batch(base), draws) > plain).all()


def test_an_untrained_pupil_has_nothing_to_keep() -> None:
    base, method = pupil(["attention", "text-encoder"], double=False)
    for delta in method.deltas.values():
        torch.nn.init.zeros_(delta.up)  # type: ignore[arg-type]
    draws = Draws(0, 0, [0, 1])
    plain = Denoise(DenoiseOptions()).loss(base, batch(base), draws)
    torch.testing.assert_close(teach(base, method, weight=1e3).loss(base, batch(base), draws), plain)


def test_the_mask_is_of_the_pictures_alone() -> None:
    base, method = pupil(["attention"], double=False)
    draws, masked = Draws(0, 0, [0, 1]), batch(base)
    masked.mask = torch.zeros(2, 1, 8, 8)
    plain = Denoise(DenoiseOptions()).loss(base, batch(base), draws)
    whole = teach(base, method).loss(base, batch(base), draws) - plain
    torch.testing.assert_close(teach(base, method).loss(base, masked, draws), whole)


def test_the_teacher_is_the_base_to_the_bit() -> None:
    fresh = random_sd1()
    base, method = pupil(["attention", "text-encoder", "convolutions"], double=False)
    objective = teach(base, method)
    x, time = torch.randn(1, 4, 8, 8, generator=generator(0, "x")), torch.tensor([500])
    asked = fresh.encode_text(["a photo of a dog"])
    assert torch.equal(objective.states[0]["states"], asked["states"])
    with torch.no_grad(), objective.alone():
        taught = base.predict(x, time, base.condition(objective.states[0]))
    assert torch.equal(taught, fresh.predict(x, time, fresh.condition(asked)))
    assert method.attachment.enabled
    assert not torch.equal(taught, base.predict(x, time, base.condition(objective.states[0])))


def test_what_fails_in_the_block_leaves_the_method_on() -> None:
    base, method = pupil(["attention"], double=False)
    with pytest.raises(RuntimeError), all_off([method]):
        raise RuntimeError
    assert method.attachment.enabled


def test_several_captions_of_unequal_length_and_each_is_used() -> None:
    base, method = pupil(["attention"], double=False)
    long = ", ".join(["a dog"] * 60)
    objective = teach(base, method, caption=["a dog", long])
    losses = {tuple(objective.loss(base, batch(base), Draws(0, step, [0, 1])).tolist()) for step in range(4)}
    assert len(losses) == 4 and all(torch.tensor(each).isfinite().all() for each in losses)


# --- in a run ----------------------------------------------------------------------------------------------


def test_a_run_resumes_exactly(recipe: Callable[..., Recipe]) -> None:
    sections: dict[str, Any] = {"objective": {"kind": "teach", "caption": ["a dog", "a photo of a dog"]},
                                "method": {"targets": ["attention", "text-encoder"], "dropout": 0.1}}
    straight = train(recipe("straight", **sections))
    train(recipe("stopped", **sections), stop_after=3)
    resumed = train(recipe("stopped", **sections))
    assert resumed.resumed_from == 3
    assert straight.artifact is not None and resumed.artifact is not None
    one, other = load_file(straight.artifact), load_file(resumed.artifact)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", EVERY_METHOD)
def test_every_method_has_a_teacher_or_is_refused(kind: str, mini: Path, photos: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"objective": {"kind": "teach", "caption": "a dog"}}
    if METHODS.get(kind).in_place:
        with pytest.raises(UserError, match=f"objective teach asks the frozen base, and {kind} trains the base itself"):
            of_method(kind, mini, photos, tmp_path / "run", **sections)
    else:
        loss = train(of_method(kind, mini, photos, tmp_path / "run", **sections)).loss
        assert loss is not None and math.isfinite(loss)


def test_what_cannot_be(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"'objective\.caption' is missing"):
        recipe(objective={"kind": "teach"})
    with pytest.raises(UserError, match=r"objective\.caption: .*at least 1"):
        recipe(objective={"kind": "teach", "caption": []})
    with pytest.raises(UserError, match=r"objective\.weight"):
        recipe(objective={"kind": "teach", "caption": "a dog", "weight": -1})
    with pytest.raises(UserError, match="unknown key 'objective.captoin'; did you mean 'caption'|captoin"):
        recipe(objective={"kind": "teach", "captoin": "a dog"})
