"""What the target words name, counted on the real SD 1.5 and read one by one on the miniature."""

from __future__ import annotations

import re

import pytest
import torch

from impasto.core.errors import UserError
from impasto.families import networks, unet_targets
from impasto.families.sd1 import SD1
from tests.checkpoints import KINDS, component_configs


@pytest.fixture(scope="module")
def real() -> dict[str, torch.nn.Module]:
    """SD 1.5's own networks, without memory."""
    configs = component_configs("sd1", "real")
    return {name: networks.build(KINDS[name], configs[name]) for name in ("unet", "text_encoder")}


@pytest.mark.parametrize(("word", "count"), [
    ("attention", 128),  # 16 transformer blocks, two attentions of four layers each
    ("cross-attention", 64),
    ("feed-forward", 32),
    ("convolutions", 22 * 2 + 14 + 3 + 3),  # 22 residual blocks, 14 of which change their width, 3 down, 3 up
    ("text-encoder", 72),  # 12 layers of six
    ("all", 128 + 32 + 64 + 32 + 22),  # and proj_in, proj_out, time_emb_proj
])
def test_counts_on_the_real_networks(real: dict[str, torch.nn.Module], word: str, count: int) -> None:
    found = unet_targets.targets(real, ("unet", "text_encoder"), word)
    assert len(found) == len(set(found)) == count


def test_words_on_the_miniature(base: SD1) -> None:
    attention = base.targets("attention")
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0" in attention
    assert set(base.targets("cross-attention")) == {path for path in attention if ".attn2." in path}
    assert {path.split(".")[-1] for path in base.targets("convolutions")} == {"conv1", "conv2", "conv_shortcut", "conv"}
    everything = set(base.targets("all"))
    for word in ("attention", "feed-forward", "convolutions"):
        assert set(base.targets(word)) < everything
    assert not {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"} & everything
    assert "unet.mid_block.attentions.0.proj_in" in everything


def test_regular_expressions(base: SD1) -> None:
    assert base.targets(r"^unet\.conv_in$") == ["unet.conv_in"]
    assert base.targets("token_embedding") == ["text_encoder.text_model.embeddings.token_embedding"]
    assert all(re.search(r"attn2\.to_[kv]$", path) for path in base.targets(r"attn2\.to_[kv]$"))
    assert not any("vae" in path for path in base.targets("."))


@pytest.mark.parametrize(("word", "hint"), [
    ("atention", "'attention'"), ("to_qq", "'to_q'"),
    ("unet.down_block.0.resnets.0.conv1", "unet.down_blocks.0.resnets.0.conv1"),
    ("(", "neither a word nor a regular expression"), ("", "words: attention"), ("zzzz", "words: attention")])
def test_nothing_found(base: SD1, word: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(hint)):
        base.targets(word)
