"""What every family does, on real and on fake tensors: Stable Diffusion 1, 3, and a stub as unlike it as can be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from impasto.core.errors import UserError
from impasto.core.rng import Draws
from impasto.deltas.attach import attach
from impasto.deltas.layers import shape_of
from impasto.deltas.lowrank import LowRank
from impasto.families.base import Base
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import sample
from impasto.objectives.batch import Batch
from impasto.objectives.denoise import Denoise, DenoiseOptions
from tests.families.conftest import random_sd1, random_sd3
from tests.families.flow_stub import FlowStub

BASES: dict[str, Callable[[], Base]] = {
    "sd1": random_sd1, "sd3": random_sd3, "sd3 without T5": functools.partial(random_sd3, t5=False),
    "flowstub": FlowStub.random}
LONG = "a very long caption, " * 40


@pytest.fixture(params=["real", "fake"])
def tensors(request: pytest.FixtureRequest):
    """Real tensors, or fake ones, which know their shapes alone."""
    fake = request.param == "fake"
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        yield fake


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, tensors: bool) -> Base:
    return BASES[request.param]()


def low_rank(base: Base, path: str) -> LowRank:
    return LowRank(shape_of(base.layer(path)), 2)


def is_fine(tensor: Tensor, fake: bool) -> bool:
    return isinstance(tensor, FakeTensor) if fake else bool(torch.isfinite(tensor).all())


def test_from_captions_and_pixels_to_a_prediction(base: Base, tensors: bool) -> None:
    pixels = torch.rand(2, 3, 64, 32) * 2 - 1
    moments = base.encode_images(pixels)
    c, shape = base.latent_channels, (2, base.latent_channels, 64 // base.cell, 32 // base.cell)
    assert moments.shape == (2, 2 * c, *shape[2:])
    latents = base.latents(moments, torch.randn(shape))
    assert latents.shape == shape
    text = base.stack_text([base.encode_text(["a cat"]), base.encode_text([[(LONG, 1.2)]])])
    assert all(len(state) == 2 for state in text.values())
    u = torch.rand(2)
    time = base.process.times(u, DenoiseOptions().density())
    prediction = base.predict(base.process.add_noise(latents, torch.randn(shape), time), time, base.condition(text))
    assert prediction.shape == shape and prediction.dtype == torch.float32 and is_fine(prediction, tensors)
    assert base.decode_latents(latents).shape == pixels.shape


def test_encoding_together_is_encoding_one_by_one_and_stacking(base: Base, tensors: bool) -> None:
    captions = ["a cat", LONG, ""]
    together = base.encode_text(captions)
    apart = base.stack_text([base.encode_text([caption]) for caption in captions])
    assert together.keys() == apart.keys()
    for name, state in together.items():
        assert state.shape == apart[name].shape
        if not tensors:
            torch.testing.assert_close(state, apart[name])


def test_targets_are_layers_that_carry_deltas(base: Base, tensors: bool) -> None:
    for word in ("attention", "feed-forward", "text-encoder", "all"):
        paths = base.targets(word)
        assert paths and all(isinstance(base.layer(path), torch.nn.Module) for path in paths)
        attach(base.components, {path: low_rank(base, path) for path in paths}).detach()
    with pytest.raises(UserError, match="attention"):
        base.targets("atention")


def test_objective_and_backward_into_deltas(base: Base, tensors: bool) -> None:
    deltas = {path: low_rank(base, path) for path in base.targets("attention")}
    text_deltas = {path: low_rank(base, path) for path in base.targets("text-encoder")}
    cells = (64 // base.cell, 32 // base.cell)
    batch = Batch(samples=[0, 1], names=["a", "b"], weight=torch.ones(2), captions=["a cat", "a dog"],
                  moments=torch.randn(2, 2 * base.latent_channels, *cells))
    with attach(base.components, deltas | text_deltas):
        loss = Denoise(DenoiseOptions()).loss(base, batch, Draws(0, 0, batch.samples))
        assert loss.shape == (2,) and loss.dtype == torch.float32 and is_fine(loss, tensors)
        loss.mean().backward()
    for delta in (deltas | text_deltas).values():
        assert all(p.grad is not None for p in delta.parameters())
    assert all(p.grad is None for module in base.components.values() for p in module.parameters())


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("scheduler", ["euler", "dpm++2m"])
def test_sampling(family: str, scheduler: str) -> None:
    base = BASES[family]()
    settings = SampleSettings(steps=4, scheduler=scheduler, width=64, height=32)
    pictures = sample(base, ["a cat", LONG], ["", "bad"], [1, 2], settings)
    assert [picture.size for picture in pictures] == [(64, 32)] * 2
    again = sample(base, ["a cat"], [""], [1], settings, init_images=pictures[:1])
    assert again[0].size == (64, 32)
