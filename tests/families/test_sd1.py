"""SD 1.x against diffusers' own pipeline and transformers' own encoder on the same weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.core.rng import picture_generator
from impasto.families.sd1 import SD1
from tests.families.conftest import LONG, random_sd1

CAPTIONS = ["a photo of sks dog", "", "猫 and 🐱, (literally)"]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("skip", [0, 1])
@torch.no_grad()
def test_encode_text_as_transformers_and_diffusers(base: SD1, pipeline: Any, skip: int) -> None:
    ids = pipeline.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    encoder = pipeline.text_encoder
    theirs = encoder.final_layer_norm(encoder(ids, output_hidden_states=True).hidden_states[-1 - skip])
    if not skip:  # which diffusers 0.42 cannot do with transformers 5.6 and later
        close(theirs, pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)[0])
    ours = dataclasses.replace(base, clip_skip=skip).encode_text(CAPTIONS)["states"]
    assert ours.shape == (3, 77, 32)
    close(ours, theirs)


@torch.no_grad()
def test_long_captions_are_their_chunks(base: SD1, pipeline: Any) -> None:
    """Each chunk of 75 tokens as transformers encodes it between its own marks."""
    ids = pipeline.tokenizer(LONG, add_special_tokens=False, verbose=False).input_ids
    assert 75 < len(ids) <= 150
    rows = [[49406, *ids[i:i + 75], 49407] for i in (0, 75)]
    rows = [row + [49407] * (77 - len(row)) for row in rows]
    theirs = pipeline.text_encoder(torch.tensor(rows)).last_hidden_state.flatten(0, 1)[None]
    close(base.encode_text([LONG])["states"], theirs)


@torch.no_grad()
def test_encode_images_as_diffusers(base: SD1, pipeline: Any) -> None:
    pixels, noise = torch.rand(2, 3, 64, 48) * 2 - 1, torch.randn(2, 4, 8, 6)
    distribution = pipeline.vae.encode(pixels).latent_dist
    moments = base.encode_images(pixels)
    close(moments, distribution.parameters)
    theirs = (distribution.mean + distribution.std * noise) * pipeline.vae.config.scaling_factor
    close(base.latents(moments, noise), theirs)
    close(base.decode_latents(theirs), pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor).sample)
    assert (base.cell, base.latent_channels) == (8, 4)


@torch.no_grad()
def test_predict_as_diffusers(base: SD1, pipeline: Any) -> None:
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3, 990])
    text = base.encode_text(CAPTIONS[:2])
    close(base.predict(x, time, base.condition(text)), pipeline.unet(x, time, text["states"]).sample)


@torch.no_grad()
def test_repeated_text_changes_nothing(base: SD1) -> None:
    """Why captions of unequal length can share a batch: the UNet says the same to a text told three times."""
    x, time = torch.randn(1, 4, 8, 8), torch.tensor([500])
    text = base.encode_text(["a cat"])["states"]
    once, thrice = (base.predict(x, time, base.condition({"states": s})) for s in (text, text.repeat(1, 3, 1)))
    close(thrice, once)
    two, three = base.encode_text([LONG]), base.encode_text([LONG * 2])
    stacked = base.stack_text([base.encode_text(["a cat"]), two, three])
    assert stacked["states"].shape[:2] == (3, 77 * 6)
    together = base.predict(x.expand(3, -1, -1, -1), time.expand(3), base.condition(stacked))
    for i, alone in enumerate([{"states": text}, two, three]):
        close(together[i:i + 1], base.predict(x, time, base.condition(alone)))


@pytest.fixture
def biased() -> SD1:
    """Its states have a mean other than zero, as a trained encoder's have."""
    base = random_sd1()
    base.text_encoder.text_model.final_layer_norm.bias.data.normal_(mean=-0.2, generator=picture_generator(0))
    return base


@torch.no_grad()
def test_weights(biased: SD1) -> None:
    """The states of a weighted word are multiplied, then all are scaled to the mean they had (A1111)."""
    base = biased
    plain = base.encode_text([[("a ", 1.0), ("cat", 1.0)]])["states"]
    weighed = base.encode_text([[("a ", 1.0), ("cat", 1.5)]])["states"]
    expected = plain.clone()
    expected[:, 2] *= 1.5
    close(weighed, expected * plain.mean() / expected.mean())
    close(base.encode_text(["a cat"])["states"], plain)


@torch.no_grad()
def test_weights_where_the_mean_is_zero(base: SD1) -> None:
    plain = base.encode_text(["a cat"])["states"]
    weighed = base.encode_text([[("a ", 1.0), ("cat", 1.5)]])["states"]
    close(weighed[:, 2], 1.5 * plain[:, 2])
    close(weighed[:, :2], plain[:, :2])


@torch.no_grad()
def test_weights_leave_neighbours_alone(biased: SD1) -> None:
    base = biased
    together = base.encode_text(["a dog", [("a cat", 1.3)]])["states"]
    assert torch.equal(together[0], base.encode_text(["a dog", "a cat"])["states"][0])
    close(together[1:], base.encode_text([[("a cat", 1.3)]])["states"])


@torch.no_grad()
def test_precisions(base: SD1) -> None:
    """A UNet in half precision takes fp32 latents and gives fp32 predictions; the VAE stays in fp32."""
    half = random_sd1()
    for name in ("unet", "text_encoder"):
        half.components[name].to(torch.bfloat16)
    text = half.encode_text(["a cat"])
    assert text["states"].dtype == torch.bfloat16
    prediction = half.predict(torch.randn(1, 4, 8, 8), torch.tensor([10]), half.condition(text))
    assert prediction.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert half.encode_images(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
        assert half.decode_latents(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_checkpointed_gradients_are_the_same() -> None:
    gradients = []
    for checkpointed in (False, True):
        base = random_sd1()
        if checkpointed:
            base.checkpoint_gradients()
        layers = [base.layer(path) for word in ("cross-attention", "text-encoder") for path in base.targets(word)]
        for layer in layers:
            layer.requires_grad_()
        torch.manual_seed(1)
        x = torch.randn(1, 4, 8, 8)
        base.predict(x, torch.tensor([5]), base.condition(base.encode_text(["a cat"]))).square().mean().backward()
        gradients.append([layer.weight.grad for layer in layers])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_settings_and_names(base: SD1) -> None:
    assert base.text_settings() == {"clip_skip": 0}
    assert base.components.keys() == {"unet", "text_encoder", "vae"}
    assert isinstance(base.layer("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"), torch.nn.Linear)
    assert not any(p.requires_grad for m in base.components.values() for p in m.parameters())
    assert not any(m.training for m in base.components.values())


def test_clip_skip_out_of_range() -> None:
    with pytest.raises(UserError, match="clip_skip 2 leaves none of 2 layers"):
        random_sd1(clip_skip=2).check()
