"""Layers of SD 3 that files have as one: queries, keys and values; and those whose halves are the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import load_adapter, save_adapter
from tests.formats.adapter_cases import dense, worst
from tests.formats.kind_cases import MAKERS, filled
from tests.formats.sd3_cases import QKV, K, Q, V, linear_layers, mini_transformer, pair


def test_a_fused_lora_is_three_with_one_down(tmp_path: Path) -> None:
    up, down = pair(12, 3, 0)
    save_file({f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert set(adapter.deltas) == {Q, K, V}
    for layer, rows in zip((Q, K, V), up.chunk(3), strict=True):
        (term,) = adapter.deltas[layer]
        assert torch.equal(term.tensors()["up"], rows) and torch.equal(term.tensors()["down"], down)


def test_three_different_loras_stand_in_blocks(tmp_path: Path) -> None:
    """And come back as they were; a missing one has rows of zeros."""
    terms = {layer: LowRank.from_factors(*pair(4, rank, rank), alpha=alpha)
             for layer, rank, alpha in ((Q, 2, 3.0), (V, 3, 0.7))}
    adapter = Adapter({layer: (term,) for layer, term in terms.items()})
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    found = load_file(tmp_path / "a.safetensors")
    up = found[f"{QKV}.lora_up.weight"]
    assert up.shape == (12, 5) and float(found[f"{QKV}.alpha"]) == 5
    assert not up[4:8].any() and not up[:4, 2:].any() and not up[8:, :2].any()
    again = load_adapter(tmp_path / "a.safetensors")
    assert worst(dense(again), dense(adapter)) < 1e-6
    assert [term.tensors()["down"].shape[0] for (term,) in again.deltas.values()] == [2, 3]


def test_the_sum_of_loras_on_one_of_them(tmp_path: Path) -> None:
    adapter = Adapter({Q: tuple(LowRank.from_factors(*pair(4, 2, seed)) for seed in range(2)),
                       K: (LowRank.from_factors(*pair(4, 2, 5)),)}, family="sd3")
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    assert worst(dense(load_adapter(tmp_path / "a.safetensors")), dense(adapter)) < 1e-6


def test_an_untrained_fused_lora_keeps_its_layers(tmp_path: Path) -> None:
    save_file({f"{QKV}.lora_up.weight": torch.zeros(12, 2), f"{QKV}.lora_down.weight": torch.ones(2, 5)},
              tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors").deltas) == {Q, K, V}
    save_adapter(Adapter({Q: (LowRank.from_factors(torch.zeros(4, 2), torch.ones(2, 5)),)}), tmp_path / "b.safetensors")
    assert Q in load_adapter(tmp_path / "b.safetensors").deltas


def test_biases_of_fused_and_swapped_layers(tmp_path: Path) -> None:
    last, out = "transformer.transformer_blocks.23.norm1_context.linear", "transformer.norm_out.linear"
    deltas = {K: (Dense.from_weight(None, torch.arange(4.0)),),
              V: (Dense.from_weight(torch.ones(4, 5), torch.ones(4)),),
              last: (Dense.from_weight(torch.randn(8, 4), torch.arange(8.0)),),
              out: (Dense.from_weight(None, torch.arange(8.0)),)}
    save_adapter(Adapter(dict(deltas)), tmp_path / "a.safetensors", dtype=torch.float32)
    found = load_file(tmp_path / "a.safetensors")
    assert found[f"{QKV}.diff_b"].tolist() == [0] * 4 + [0, 1, 2, 3] + [1] * 4
    swapped = [4, 5, 6, 7, 0, 1, 2, 3]
    assert found["lora_unet_final_layer_adaLN_modulation_1.diff_b"].tolist() == swapped
    assert found["lora_unet_joint_blocks_23_context_block_adaLN_modulation_1.diff_b"].tolist() == swapped
    again = load_adapter(tmp_path / "a.safetensors")
    assert set(again.deltas) == set(deltas)
    for layer, (term,) in deltas.items():
        assert torch.equal(sum(t.bias() for t in again.deltas[layer] if t.bias() is not None), term.bias())
    alone = Adapter({last: (Dense.from_weight(None, torch.arange(8.0)),)})
    with pytest.raises(UserError, match="which halves|does not tell"):
        save_adapter(alone, tmp_path / "b.safetensors")


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("format", ["kohya", "comfyui", "onetrainer"])
def test_every_kind_keeps_its_change(kind: str, format: str, tmp_path: Path) -> None:
    """On all layers; what files with fused layers have no place for is refused."""
    draw, transformer = torch.Generator().manual_seed(1), mini_transformer()
    deltas = {layer: (filled(MAKERS[kind](transformer.get_submodule(layer.partition(".")[2])), draw),)
              for layer in linear_layers()}
    adapter = Adapter(deltas, family="sd3")
    if kind == "dora-in" and format != "onetrainer":
        with pytest.raises(UserError, match="magnitude for each"):
            save_adapter(adapter, tmp_path / "a.safetensors", format=format, dtype=torch.float32)
        return
    save_adapter(adapter, tmp_path / "a.safetensors", format=format, dtype=torch.float32)
    again = load_adapter(tmp_path / "a.safetensors")
    assert set(again.deltas) == set(deltas)
    for layer, (term,) in deltas.items():
        W = transformer.get_submodule(layer.partition(".")[2]).weight.double()
        ours = sum(t.weight(W).double().reshape(W.shape) for t in again.deltas[layer] if t.shape)
        assert float((ours - term.weight(W).double()).norm()) <= 1e-6 * float(W.norm() + term.weight(W).norm()), layer


def test_norms_without_a_bias_get_none(tmp_path: Path) -> None:
    layers = ["transformer.transformer_blocks.0.attn.norm_added_q", "transformer.transformer_blocks.0.attn2.norm_k",
              "text_encoder_3.encoder.block.0.layer.0.layer_norm"]
    adapter = Adapter({layer: (Dense.from_weight(torch.ones(8)),) for layer in layers})
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == {
        "lora_unet_joint_blocks_0_context_block_attn_ln_q.w_norm", "lora_unet_joint_blocks_0_x_block_attn2_ln_k.w_norm",
        "lora_te3_encoder_block_0_layer_0_layer_norm.w_norm"}
    assert set(load_adapter(tmp_path / "a.safetensors").deltas) == set(layers)


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    up, down = torch.ones(12, 1), torch.ones(1, 5)
    both = {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down,
            "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight": up[:4].clone(),
            "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight": down.clone()}
    uneven = {f"{QKV}.lora_up.weight": torch.ones(11, 1), f"{QKV}.lora_down.weight": down}
    scaled = {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down, f"{QKV}.dora_scale": torch.ones(1, 5)}
    for tensors, line in ((both, "twice"), (uneven, "equal parts"), (scaled, "magnitude for each input")):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=line):
            load_adapter(tmp_path / "a.safetensors")
