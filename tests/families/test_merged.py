"""Adapters in a base's weights: what they change there, and that nothing takes it for the base alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.data.cache import image_encoder_key, text_encoder_key
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import save_adapter
from tests.checkpoints import write_checkpoint

PATHS = ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
         "text_encoder.text_model.encoder.layers.0.self_attn.q_proj")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors")


def adapter(base: Base, path: Path, layers: tuple[str, ...], seed: int = 0, family: str = "sd1") -> Adapter:
    made = {}
    for layer in layers:
        out, inner = base.layer(layer).weight.shape
        draw = torch.Generator().manual_seed(seed)
        up, down = torch.randn(out, 2, generator=draw), torch.randn(2, inner, generator=draw)
        made[layer] = (LowRank.from_factors(up, down),)
    made = Adapter(made, family=family)
    save_adapter(made, path, dtype=torch.float32)
    return made


def test_weights_are_the_sum_and_fingerprints_tell(mini: Path, tmp_path: Path) -> None:
    plain = load_base(mini)
    one = adapter(plain, tmp_path / "one.safetensors", PATHS)
    two = adapter(plain, tmp_path / "two.safetensors", PATHS[:1], seed=1)
    base = load_base(mini, adapters=[str(tmp_path / "one.safetensors"), f"{tmp_path / 'two.safetensors'}:0.5"])
    for layer, expected in ((PATHS[0], one.dense(PATHS[0]) + 0.5 * two.dense(PATHS[0])),
                            (PATHS[1], one.dense(PATHS[1]))):
        assert_close(base.layer(layer).weight, plain.layer(layer).weight + expected)
    assert base.origin() == plain.origin() == plain.fingerprint()
    assert {name for name, digest in base.fingerprint().items() if digest != base.origin()[name]} == {
        "unet", "text_encoder"}
    assert text_encoder_key(base, base.fingerprint()) != text_encoder_key(plain, plain.fingerprint())
    assert image_encoder_key(base, base.fingerprint()) == image_encoder_key(plain, plain.fingerprint())
    again = load_base(mini, adapters=[str(tmp_path / "one.safetensors"), f"{tmp_path / 'two.safetensors'}:0.5"])
    assert again.fingerprint() == base.fingerprint()
    other = load_base(mini, adapters=[str(tmp_path / "one.safetensors"), f"{tmp_path / 'two.safetensors'}:0.6"])
    assert other.fingerprint()["unet"] != base.fingerprint()["unet"]
    assert other.fingerprint()["text_encoder"] == base.fingerprint()["text_encoder"]  # the second is not in there


def test_an_adapter_of_another_family_is_refused(mini: Path, tmp_path: Path) -> None:
    adapter(load_base(mini), tmp_path / "other.safetensors", PATHS[:1], family="sdxl")
    with pytest.raises(UserError, match="sdxl"):
        load_base(mini, adapters=[str(tmp_path / "other.safetensors")])
