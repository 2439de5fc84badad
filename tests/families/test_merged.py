"""Adapters in a base's weights: what they change there, and that nothing takes it for the base alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.data.cache import image_encoder_key, text_encoder_key
from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.lowrank import LowRank
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import save_adapter
from impasto.methods.full import Full
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


def test_errors_name_the_file(mini: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    adapter(load_base(mini), good, PATHS)
    save_adapter(Adapter({PATHS[0]: (LowRank((8, 8), 2),)}, family="sd1"), bad)
    with pytest.raises(UserError, match=rf"^{bad}: {PATHS[0]}: the layer's weight is .* the adapter's change is"):
        load_base(mini, adapters=[str(good), str(bad)])


def several(base: Base, folder: Path) -> list[str]:
    """Adapters of every kind that merges otherwise: LoRA, full differences of weights and biases, of norms, DoRA."""
    norm, biased = "unet.conv_norm_out", "unet.conv_in"
    draw = torch.Generator().manual_seed(3)
    like = {path: torch.randn(base.parameter(path).shape, generator=draw) * 0.1
            for path in (f"{norm}.weight", f"{norm}.bias", f"{biased}.weight", f"{biased}.bias")}
    full = {layer: (Dense.from_weight(like[f"{layer}.weight"], like[f"{layer}.bias"]),) for layer in (norm, biased)}
    (out, into) = base.layer(PATHS[0]).weight.shape
    inner = LowRank.from_factors(torch.randn(out, 2, generator=draw), torch.randn(2, into, generator=draw))
    save_adapter(Adapter({**full, PATHS[0]: (Dora(inner, torch.rand(out, 1, generator=draw) + 0.5),)}, family="sd1"),
                 folder / "two.safetensors", dtype=torch.float32)
    adapter(base, folder / "one.safetensors", PATHS)
    return [f"{folder / 'one.safetensors'}:0.5", str(folder / "two.safetensors")]


@pytest.mark.parametrize("parts", [["unet", "text-encoder"], ["biases"], ["norms"], ["attention"], ["conv_in.weight"]])
def test_weights_that_are_trained_in_fp32_keep_what_was_merged(mini: Path, tmp_path: Path, parts: list[str]) -> None:
    """Those of a base in bf16 are what they are of one in fp32; the others stay as they were, and nothing is put on
    twice."""
    adapters = several(load_base(mini), tmp_path)
    wide, base = load_base(mini, adapters=adapters), load_base(mini, adapters=adapters, dtype=torch.bfloat16)
    before = {name: {path: parameter.detach().clone() for path, parameter in base.components[name].named_parameters()}
              for name in ("unet", "text_encoder")}
    Full(Full.Options.model_validate({"kind": "full", "parts": parts})).prepare(base, seed=0)
    held = 0
    for name, parameters in before.items():
        for path, parameter in base.components[name].named_parameters():
            want = wide.components[name].get_parameter(path) if parameter.dtype == torch.float32 else parameters[path]
            held += parameter.dtype == torch.float32
            assert torch.equal(parameter, want), path
    assert held and base.fingerprint() == wide.fingerprint()
