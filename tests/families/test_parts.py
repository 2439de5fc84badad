"""Which weights a word of full fine-tuning names, against lists written by hand."""

from __future__ import annotations

import re

import pytest
from torch import nn

from impasto.core.errors import UserError
from impasto.families.base import Base
from tests.families.conftest import random_sd1
from tests.families.flow_stub import FlowStub


@pytest.fixture(scope="module")
def base() -> Base:
    return random_sd1()


#: of the miniature UNet: one block with attention on each side, one in the middle
TRANSFORMERS = [f"unet.{block}.transformer_blocks.0" for block in (
    "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")]


def everything(base: Base, *components: str) -> list[str]:
    return [f"{name}.{path}" for name in components or base.components
            for path, _ in base.components[name].named_parameters()]


def of_attention(*leaves: str) -> set[str]:
    return {f"{path}.{leaf}" for path in TRANSFORMERS for leaf in leaves}


def test_words_for_layers(base: Base) -> None:
    four = [f"{leaf}.weight" for leaf in ("to_q", "to_k", "to_v", "to_out.0")] + ["to_out.0.bias"]
    assert set(base.parts("cross-attention")) == of_attention(*(f"attn2.{leaf}" for leaf in four))
    assert set(base.parts("attention")) == of_attention(*(f"attn{n}.{leaf}" for leaf in four for n in (1, 2)))
    assert set(base.parts("keys-values")) == of_attention("attn2.to_k.weight", "attn2.to_v.weight")
    assert set(base.parts("feed-forward")) == of_attention("ff.net.0.proj.weight", "ff.net.0.proj.bias",
                                                           "ff.net.2.weight", "ff.net.2.bias")
    for word in ("convolutions", "all"):  # the layers that a target word names, with their biases
        layers = base.targets(word)
        assert set(base.parts(word)) == {f"{path}.{leaf}" for path in layers
                                         for leaf, _ in base.layer(path).named_parameters()}


def test_words_for_networks(base: Base) -> None:
    assert base.parts("unet") == everything(base, "unet")
    assert base.parts("text-encoder") == everything(base, "text_encoder")
    assert base.parts("vae") == everything(base, "vae")
    decoder = base.parts("vae-decoder")
    assert decoder == [path for path in everything(base, "vae") if ".encoder." not in path and ".quant_" not in path]
    assert {path.split(".")[1] for path in decoder} == {"decoder", "post_quant_conv"}


def test_norms_biases_and_the_middle(base: Base) -> None:
    kinds = {path: type(module) for path, module in base.denoiser.named_modules()}
    norms = [path for path in everything(base, "unet")
             if kinds[path.removeprefix("unet.").rpartition(".")[0]] in (nn.GroupNorm, nn.LayerNorm)]
    # 2 in each of 7 ResNet blocks, 4 in each of 4 transformers, the last one; weight and bias
    assert base.parts("norms") == norms and len(norms) == 2 * (2 * 8 + 4 * 4 + 1)
    assert base.parts("biases") == [path for path in everything(base, "unet") if path.endswith("bias")]
    assert base.parts("mid-block") == [path for path in everything(base, "unet") if path.startswith("unet.mid_block.")]


@pytest.mark.parametrize(("word", "start"), [
    ("down_blocks.1", "unet.down_blocks.1."), ("unet.down_blocks.1", "unet.down_blocks.1."),
    ("conv_in", "unet.conv_in."), ("time_embedding", "unet.time_embedding."), ("text_encoder", "text_encoder."),
    ("vae.decoder.conv_out", "vae.decoder.conv_out."), ("unet.conv_in.bias", "unet.conv_in.bias"),
])
def test_a_path_names_what_lies_there_and_no_more(word: str, start: str, base: Base) -> None:
    found = base.parts(word)
    assert found == [path for path in everything(base) if path.startswith(start)] and found


@pytest.mark.parametrize(("pattern", "components"), [
    (r"attn2.*\.bias$", ("unet", "text_encoder")), (r"norm\d?\.weight", ("unet", "text_encoder")),
    (r"^text_encoder\..*fc[12]", ("unet", "text_encoder")), (r"^vae.*conv_shortcut", ("vae",)), ("vae.+bias", ("vae",)),
])
def test_a_regular_expression_is_searched_for_in_full_paths(pattern: str, components: tuple[str, ...], base: Base
                                                            ) -> None:
    assert base.parts(pattern) == [path for path in everything(base, *components) if re.search(pattern, path)]


@pytest.mark.parametrize(("word", "hint"), [
    ("key-values", "did you mean 'keys-values'"), ("crossattention", "'cross-attention'"),
    ("down_blocks.7", "'down_blocks.1'"), (r"atn2\.to_k", "to_k"),
    (r"vae\.decoder\.conv_outt", "'decoder.conv_out'"), ("zzzz", "words: unet, text-encoder"), ("", "words: unet"),
    ("(", "(missing )"), (r"unet\.(", "nor a regular expression"),
])
def test_what_names_nothing_is_an_error_with_near_matches(word: str, hint: str, base: Base) -> None:
    with pytest.raises(UserError, match=re.escape(hint)) as told:
        base.parts(word)
    assert "\n" not in str(told.value)


def test_another_family_has_its_own_words() -> None:
    base = FlowStub.random()
    assert base.parts("unet") == everything(base, "transformer")  # the denoiser, whatever it is called
    assert base.parts("text-encoder") == everything(base, *base.text_encoder_names)
    assert "transformer.attn.to_q.bias" in base.parts("attention") and len(base.parts("attention")) == 8
    assert base.parts("time_in") == ["transformer.time_in.weight", "transformer.time_in.bias"]
    with pytest.raises(UserError, match="'mid-block' names no weight"):
        base.parts("mid-block")
