"""SD 3 against diffusers' own pipeline on the same weights: with T5 and without, of 3 and of 3.5."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from impasto.core.errors import UserError
from impasto.deltas.attach import attach
from impasto.deltas.layers import shape_of
from impasto.deltas.lowrank import LowRank
from impasto.families.load import load_base
from impasto.families.networks import T5Text
from impasto.families.prompts import parse
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import sample
from impasto.families.save import save_folder
from impasto.families.sd3 import SD3, WithoutT5
from impasto.formats.checkpoint import open_checkpoint
from impasto.methods import METHODS
from impasto.methods.base import check_method
from tests.checkpoints import SD35, write_checkpoint
from tests.families.conftest import LONG, random_sd3
from tests.heard import Heard

CAPTIONS = ["a photo of sks dog", "", "猫 and 🐱, (literally)"]
CASES = {"3": ({}, ()), "3.5": (SD35, ()), "3 without T5": ({}, ("text_encoder_3",))}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=CASES)
def folder3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes, without = CASES[request.param]
    return write_checkpoint(tmp_path_factory.mktemp("sd3") / "mini", "sd3", layout="diffusers", changes=changes,
                            without=without)


@pytest.fixture(scope="module")
def base3(folder3: Path) -> SD3:
    loaded = load_base(folder3)
    assert isinstance(loaded, SD3)
    return loaded


@pytest.fixture(scope="module")
def theirs(folder3: Path, base3: SD3) -> Iterator[Any]:
    missing: dict[str, Any] = {} if base3.t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder3, local_files_only=True, **missing)
    pipe.set_progress_bar_config(disable=True)
    yield pipe


@pytest.mark.parametrize("captions", [CAPTIONS, [LONG, "a cat", ""]], ids=["short", "long"])
@torch.no_grad()
def test_text_as_diffusers(base3: SD3, theirs: Any, captions: list[str]) -> None:
    states, _, pooled, _ = theirs.encode_prompt(captions, None, None, "cpu", do_classifier_free_guidance=False)
    told = base3.condition(base3.encode_text(captions))
    assert told["encoder_hidden_states"].shape == (3, 77 + 256, 176)
    close(told["encoder_hidden_states"], states)
    close(told["pooled_projections"], pooled)


@torch.no_grad()
def test_other_lengths_and_layers_as_diffusers(base3: SD3, theirs: Any) -> None:
    other = dataclasses.replace(base3, t5_length=77, clip_skip=0)
    states, *_ = theirs.encode_prompt(CAPTIONS, None, None, "cpu", do_classifier_free_guidance=False,
                                      max_sequence_length=77)
    close(other.condition(other.encode_text(CAPTIONS))["encoder_hidden_states"], states)
    skipping = dataclasses.replace(base3, clip_skip=1)
    states, *_ = theirs.encode_prompt(CAPTIONS, None, None, "cpu", do_classifier_free_guidance=False, clip_skip=1)
    close(skipping.condition(skipping.encode_text(CAPTIONS))["encoder_hidden_states"], states)
    with pytest.raises(UserError, match="clip_skip 1 leaves none of 1 layers"):
        skipping.check()


@torch.no_grad()
def test_images_as_diffusers(base3: SD3, theirs: Any) -> None:
    pixels, noise = torch.rand(2, 3, 64, 48) * 2 - 1, torch.randn(2, 16, 8, 6)
    distribution, config = theirs.vae.encode(pixels).latent_dist, theirs.vae.config
    moments = base3.encode_images(pixels)
    close(moments, distribution.parameters)
    latents = (distribution.mean + distribution.std * noise - config.shift_factor) * config.scaling_factor
    close(base3.latents(moments, noise), latents)
    close(base3.decode_latents(latents),
          theirs.vae.decode(latents / config.scaling_factor + config.shift_factor).sample)
    assert (base3.cell, base3.grid, base3.latent_channels, base3.native_size) == (8, 16, 16, 64)
    assert base3.latent_scale == 1.5305
    with base3.keeping_latent_scale():
        base3.set_latent_scale(2.0)
        close(base3.latents(moments, noise), latents / config.scaling_factor * 2)


@torch.no_grad()
def test_predict_as_diffusers(base3: SD3, theirs: Any) -> None:
    x, time = torch.randn(2, 16, 8, 6), torch.tensor([0.25, 1.0])
    condition = base3.condition(base3.encode_text(CAPTIONS[:2]))
    close(base3.predict(x, time, condition), theirs.transformer(x, timestep=time * 1000, **condition).sample)
    with pytest.raises(UserError, match="no picture with a side above 192 pixels"):
        base3.predict(torch.randn(2, 16, 8, 26), time, condition)


@pytest.mark.parametrize("negative", ["", "a blurred photo"])
def test_pictures_as_diffusers(base3: SD3, theirs: Any, negative: str) -> None:
    drawn = theirs(CAPTIONS[0], negative_prompt=negative, num_inference_steps=4, guidance_scale=5.0, height=64,
                   width=96, generator=torch.Generator("cpu").manual_seed(3)).images[0]
    settings = SampleSettings(steps=4, guidance=5.0, scheduler="euler", width=96, height=64)
    # among neighbours of other lengths, on which it does not depend
    ours = sample(base3, [LONG, CAPTIONS[0]], ["", negative], [4, 3], settings)[1]
    assert np.abs(np.asarray(ours, int) - np.asarray(drawn, int)).max() <= 1
    with pytest.raises(UserError, match="width 72 is not a multiple of 16 pixels; take 64"):
        sample(base3, ["a"], [""], [0], dataclasses.replace(settings, width=72))


# --- text ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_of_words() -> None:
    base = random_sd3()
    plain, weighed = base.encode_text(["a cat"]), base.encode_text([parse("a (cat:1.5)")])
    for name, place in (("clip", 2), ("t5", 1)):
        changed = (plain[name] != weighed[name]).any(dim=-1)[0]
        assert changed[place] and (name == "t5" or changed.sum() in (1, 77))
    assert torch.equal(plain["pooled"], weighed["pooled"])
    torch.testing.assert_close(base.encode_text([[("a ", 1.0), ("cat", 1.0)]]), plain)


@torch.no_grad()
def test_what_fills_t5_up_may_be_hidden() -> None:
    """Then its states are those of the text alone, and zeros; captions take the room of what they say."""
    base = dataclasses.replace(random_sd3(), mask_padding=True)
    t5 = base.t5
    assert t5 is not None and base.t5_tokenizer is not None
    short, long = base.encode_text(["a cat"]), base.encode_text(["a photo of a dog"])
    assert short["t5"].shape[1] == 3 and long["t5"].shape[1] == 6
    close(short["t5"], t5(torch.tensor(base.t5_tokenizer(["a cat"]).input_ids)))
    together = base.stack_text([short, long])
    close(together["t5"], base.encode_text(["a cat", "a photo of a dog"])["t5"])
    for states, alone in zip(base.condition(together)["encoder_hidden_states"], (short, long), strict=True):
        assert torch.equal(states, base.condition(alone)["encoder_hidden_states"][0])
    assert base.text_settings() != random_sd3().text_settings()


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_new_tokens(encoder: str) -> None:
    base = random_sd3()
    before = base.encode_text(["a <cat> dog"])
    width = base.vocabulary(encoder).width
    vectors = torch.randn(2, width, requires_grad=True)
    added = base.tokens.add({"<cat>": {encoder: vectors}})
    states = base.encode_text(["a <cat> dog"])
    sum(state.square().sum() for state in states.values()).backward()  # pyright: ignore
    assert vectors.grad is not None and (vectors.grad.abs().sum(dim=1) > 0).all()
    changed = {name for name in states if not torch.equal(states[name], before[name])}
    assert changed == ({"t5"} if encoder == "text_encoder_3" else {"clip", "pooled"})
    added.detach()
    assert all(torch.equal(a, b) for a, b in zip(base.encode_text(["a <cat> dog"]).values(), before.values(),
                                                  strict=True))
    assert base.token_encoders == ("text_encoder", "text_encoder_2")


def test_a_token_that_does_not_fit_is_left_out_whole() -> None:
    base = random_sd3()
    with torch.no_grad():
        base.tokens.add({"sks": {"text_encoder_3": torch.randn(5, 176)}})
        seven = " ".join(["dog"] * 7)
        fits, cut = (base.encode_text([f"{' '.join(['dog'] * n)} sks"])["t5"] for n in (6, 7))
        assert torch.equal(cut, base.encode_text([seven])["t5"])
        assert not torch.equal(fits, base.encode_text([" ".join(["dog"] * 6)])["t5"])


# --- loading and saving ------------------------------------------------------------------------------------


def test_a_single_file_draws_the_same(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "mini.safetensors", "sd3")
    folder = write_checkpoint(tmp_path / "mini", "sd3", layout="diffusers")
    heard = Heard()
    without = load_base(file, report=heard)
    assert isinstance(without, WithoutT5) and without.text_encoder_names == ("text_encoder", "text_encoder_2")
    assert [line for line in heard.notes if "T5" in line] == [
        "goes on without T5, which understands long captions: there is no tokenizer_3; put that folder, of a diffusers "
        "folder of this model, beside the file"]
    (tmp_path / "tokenizer_3").symlink_to(folder / "tokenizer_3")
    one, other = load_base(file), load_base(folder)
    assert not isinstance(one, WithoutT5) and one.surplus == []
    assert one.fingerprint() == other.fingerprint()
    settings = SampleSettings(steps=2, scheduler="euler", width=64, height=64)
    pictures = [np.asarray(sample(base, ["a cat"], [""], [1], settings)[0]) for base in (one, other, without)]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_what_a_checkpoint_lacks(tmp_path: Path) -> None:
    heard = Heard()
    load_base(write_checkpoint(tmp_path / "a.safetensors", "sd3", without=("text_encoder_3",)), report=heard)
    assert [line for line in heard.notes if "T5" in line] == [
        "goes on without T5, which understands long captions: the checkpoint holds none"]
    for without, line in ((("text_encoder", "text_encoder_2", "text_encoder_3"), "holds no text encoders; name"),
                          (("text_encoder_2",), "holds no text_encoder_2"), (("vae",), "holds no vae; give a VAE")):
        with pytest.raises(UserError, match=line):
            load_base(write_checkpoint(tmp_path / "b.safetensors", "sd3", without=without))


def test_another_vae_has_this_familys_scale(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = write_checkpoint(tmp_path / "a.safetensors", "sd3", without=("text_encoder_3",))
    vae = {key: tensor for key, tensor in load_file(file).items() if key.startswith("first_stage_model.")}
    told = open_checkpoint(file).metadata
    save_file(vae, tmp_path / "vae.safetensors", told)
    bare = write_checkpoint(tmp_path / "b.safetensors", "sd3", without=("text_encoder_3", "vae"))
    base = load_base(bare, vae=tmp_path / "vae.safetensors")
    assert (base.latent_scale, base.latent_channels) == (1.5305, 16)


@pytest.mark.parametrize("t5", [True, False])
def test_a_saved_folder_is_diffusers_own(t5: bool, tmp_path: Path) -> None:
    base = random_sd3(t5)
    save_folder(base, tmp_path / "out", dtype=torch.float32)
    missing: dict[str, Any] = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **missing)
    base = dataclasses.replace(base, t5_length=256)
    with torch.no_grad():
        states, *_ = pipe.encode_prompt(CAPTIONS, None, None, "cpu", do_classifier_free_guidance=False)
        close(base.condition(base.encode_text(CAPTIONS))["encoder_hidden_states"], states)
    again = load_base(tmp_path / "out")
    assert again.fingerprint() == base.fingerprint()


def test_half_precision(folder3: Path) -> None:
    """T5's last matrices overflow in fp16: they stay in fp32, as transformers has them."""
    half = load_base(folder3, dtype=torch.float16)
    assert isinstance(half, SD3)
    if isinstance(half.t5, T5Text):
        wide = {name for name, parameter in half.t5.named_parameters() if parameter.dtype == torch.float32}
        assert wide == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in (0, 1)}
        theirs = StableDiffusion3Pipeline.from_pretrained(folder3, dtype=torch.float16).text_encoder_3
        assert {name for name, parameter in theirs.named_parameters() if parameter.dtype == torch.float32} == wide
    half = load_base(folder3, dtype=torch.bfloat16)
    assert {p.dtype for name in half.text_encoder_names for p in half.components[name].parameters()} == {torch.bfloat16}
    assert half.denoiser.get_buffer("pos_embed.pos_embed").dtype == torch.bfloat16
    with torch.no_grad():
        text = half.encode_text(["a cat"])
        assert all(state.dtype == torch.bfloat16 for state in text.values())
        said = half.predict(torch.randn(1, 16, 8, 8), torch.tensor([0.5]), half.condition(text))
        assert said.dtype == torch.float32 and torch.isfinite(said).all()


# --- training ----------------------------------------------------------------------------------------------


def test_targets(base3: SD3) -> None:
    blocks, dual = 3, 2 * bool(base3.config("transformer").dual_attention_layers)
    attention = base3.targets("attention")
    assert len(attention) == blocks * 8 - 2  # the last block has no to_add_out, and no use of add_q_proj
    assert not any("attn2" in path for path in attention)
    assert len(base3.targets("feed-forward")) == blocks * 4 - 2
    assert len(base3.targets("text-encoder")) == 4 * 6
    assert len(base3.targets(r"attn2\.to_q$")) == dual if dual else True
    linear = {name for name, module in base3.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {path.removeprefix("transformer.") for path in base3.targets("all")} == {
        name for name in linear if name.startswith("transformer_blocks.")} - {"transformer_blocks.2.attn.add_q_proj"}
    if base3.t5 is not None:
        assert len(base3.targets("t5")) == 2 * 7
    for word in ("cross-attention", "convolutions"):
        with pytest.raises(UserError, match=f"'{word}' names no layer of this base; .* network"):
            base3.targets(word)


def test_parts(base3: SD3) -> None:
    assert len(base3.parts("attention")) == 2 * len(base3.targets("attention"))
    assert base3.parts("transformer") == base3.parts("unet")
    assert base3.parts("transformer_blocks.0.attn.to_q") == [
        f"transformer.transformer_blocks.0.attn.to_q.{leaf}" for leaf in ("weight", "bias")]
    assert all(path.startswith("vae.decoder.") for path in base3.parts("vae-decoder"))


@pytest.mark.parametrize("kind", list(METHODS))
def test_methods_that_it_refuses_say_why(kind: str, base3: SD3) -> None:
    options = {"token": "<cat>"} if kind == "textual_inversion" else {}
    method = METHODS.get(kind)(METHODS.get(kind).Options(**options))
    if kind in base3.refuses:
        with pytest.raises(UserError, match="a base of the family sd3 cannot be trained so: .*; train a LoRA"):
            check_method(method, base3)
    else:
        check_method(method, base3)


def test_checkpointed_gradients_are_the_same() -> None:
    gradients = []
    for checkpointed in (False, True):
        base = random_sd3()
        if checkpointed:
            base.checkpoint_gradients()
        layers = [base.layer(path) for word in ("attention", "text-encoder", "t5") for path in base.targets(word)]
        for layer in layers:
            layer.requires_grad_()
        torch.manual_seed(1)
        x = torch.randn(1, 16, 8, 8)
        base.predict(x, torch.tensor([0.5]), base.condition(base.encode_text(["a cat"]))).square().mean().backward()
        gradients.append([layer.weight.grad for layer in layers])
        assert all(gradient is not None for gradient in gradients[-1])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_lora_attached_is_the_lora_merged() -> None:
    base3 = random_sd3()
    paths = [*base3.targets("attention"), *base3.targets("text-encoder")]
    torch.manual_seed(0)
    deltas = {path: LowRank(shape_of(base3.layer(path)), 2) for path in paths}
    for delta in deltas.values():
        for factor in delta.parameters():
            torch.nn.init.normal_(factor, std=0.3)
    x, time = torch.randn(1, 16, 8, 8), torch.tensor([0.5])

    def said() -> torch.Tensor:
        with torch.no_grad():
            return base3.predict(x, time, base3.condition(base3.encode_text(["a cat"])))

    before = said()
    attached = attach(base3.components, deltas)
    changed = said()
    assert not torch.allclose(changed, before, atol=1e-3)
    attached.detach()
    close(said(), before)
    attach(base3.components, deltas).merge()
    close(said(), changed)
