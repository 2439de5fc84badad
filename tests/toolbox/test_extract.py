"""What is extracted from two checkpoints, against what was put between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import impasto
from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.ranks import Wanted
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.toolbox.extract import extract_to, extracted, nearest_product
from impasto.toolbox.merge import merge_adapters
from tests.formats.adapter_cases import random_adapter
from tests.formats.checkpoint_cases import tensors_of

Written = Callable[..., Path]


def tuned(written: Written, folder: Path, layout: str = "ldm") -> Path:
    """The base with a LoRA merged in."""
    save_adapter(random_adapter(), folder / "a.safetensors", dtype=torch.float32)
    out = folder / ("tuned" if layout == "diffusers" else "tuned.safetensors")
    merge_adapters(written(layout), [Weighted(str(folder / "a.safetensors"))], out)
    return out


@pytest.mark.parametrize("first, second", [("ldm", "ldm"), ("ldm", "diffusers"), ("diffusers", "ldm")])
def test_a_lora_that_was_merged_comes_out_again(first: str, second: str, written: Written, tmp_path: Path) -> None:
    made = extract_to(written(first), tuned(written, tmp_path, second), tmp_path / "out.safetensors", Wanted(rank=6),
                   dtype=torch.float32)
    found, plain = load_adapter(tmp_path / "out.safetensors"), random_adapter()
    assert set(found.layers) == set(plain.layers) and made.error < 1e-3 and not made.remarks
    for layer in plain.layers:
        wanted = plain.dense(layer)
        torch.testing.assert_close(found.dense(layer), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wanted", [Wanted(rank=2), Wanted(energy=0.8), Wanted(size=20_000)])
def test_what_is_lost_is_told(wanted: Wanted, written: Written, tmp_path: Path) -> None:
    other = tuned(written, tmp_path)
    adapter, made = extracted(written(), other, wanted)
    before, after = (tensors_of(open_checkpoint(path)) for path in (written(), other))
    for layer, kept in made.layers.items():
        change = (after[f"{layer}.weight"] - before[f"{layer}.weight"]).double()
        gap = float((adapter.dense(layer).double().reshape(change.shape) - change).norm() / change.norm())
        assert gap == pytest.approx(kept.error, abs=2e-3)
    assert 0 < made.error < 1


def test_what_no_adapter_holds_is_told(written: Written, tmp_path: Path) -> None:
    tensors = load_file(tuned(written, tmp_path))
    for key in ("first_stage_model.decoder.conv_in.weight", "model.diffusion_model.out.0.bias",
                "model.diffusion_model.out.2.bias",
                "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"):
        tensors[key] = tensors[key] + 0.5
    with safe_open(written(), "pt") as opened:
        save_file(tensors, tmp_path / "more.safetensors", opened.metadata())
    remarks = extracted(written(), tmp_path / "more.safetensors", Wanted(rank=1))[1].remarks
    told = [remark.partition(" changed")[0] for remark in sorted(remarks)]
    assert told == ["biases", "embeddings", "norms", "the VAE"]


def test_the_nearest_kronecker_product(written: Written) -> None:
    """Of a product itself: all of it. Of anything: the least error of alternating least squares, from many starts."""
    draw = torch.Generator().manual_seed(0)
    exact = Kronecker.from_factors((24, 16, 3, 3), w1=torch.randn(4, 4, generator=draw),
                                   w2=torch.randn(6, 4, 3, 3, generator=draw))
    delta, kept = nearest_product(exact.weight().detach(), 4)
    torch.testing.assert_close(delta.weight(), exact.weight(), rtol=1e-4, atol=1e-5)
    assert kept.error < 1e-3
    change = torch.randn(12, 8, generator=draw, dtype=torch.float64)
    delta, kept = nearest_product(change, 4)
    assert float((delta.weight() - change).norm() / change.norm()) == pytest.approx(kept.error, rel=1e-6)
    blocks = change.reshape(3, 4, 2, 4).permute(0, 2, 1, 3) if delta.tensors()["w1"].shape == (3, 2) else \
        change.reshape(*(n for pair in zip(delta.tensors()["w1"].shape, delta.tensors()["w2"].shape, strict=True)
                         for n in pair)).permute(0, 2, 1, 3)
    best = 1.0
    for seed in range(20):
        second = torch.randn(blocks.shape[2:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(200):
            first = torch.einsum("abcd,cd->ab", blocks, second) / second.square().sum()
            second = torch.einsum("abcd,ab->cd", blocks, first) / first.square().sum()
        gap = blocks - torch.einsum("ab,cd->abcd", first, second)
        best = min(best, float(gap.norm() / change.norm()))
    assert kept.error == pytest.approx(best, rel=1e-6)


def test_rounding_is_no_change(written: Written, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer that differs"):
        extracted(written(), written(dtype=torch.float16), Wanted(rank=2))


def test_it_is_one_call_away(written: Written, tmp_path: Path) -> None:
    adapter = impasto.extract(written(), tuned(written, tmp_path), rank=6)
    layer = next(iter(adapter.layers))
    torch.testing.assert_close(adapter.dense(layer), random_adapter().dense(layer), rtol=1e-3, atol=1e-4)


def test_a_lokr_is_extracted(written: Written, tmp_path: Path) -> None:
    made = extract_to(written(), tuned(written, tmp_path), tmp_path / "out.safetensors", kind="lokr",
                      dtype=torch.float32)
    found = load_adapter(tmp_path / "out.safetensors")
    assert {term.kind for terms in found.deltas.values() for term in terms} == {"lokr"} and 0 < made.error < 1


def test_what_has_no_difference_is_one_line(written: Written, tmp_path: Path) -> None:
    for first, second, line in (
            (written(), written(), "has no layer that differs"),
            (written(), written(variant="inpainting"), "conv_in.weight is .*one kind"),
            (written(), tmp_path / "none.safetensors", "no such file")):
        with pytest.raises(UserError, match=line):
            extract_to(first, second, tmp_path / "out.safetensors", Wanted(rank=2))
    tensors = load_file(tuned(written, tmp_path))
    tensors["model.diffusion_model.out.2.weight"][0, 0] = float("nan")
    with safe_open(written(), "pt") as opened:
        save_file(tensors, tmp_path / "nan.safetensors", opened.metadata())
    with pytest.raises(UserError, match="conv_out.weight holds NaN"):
        extract_to(written(), tmp_path / "nan.safetensors", tmp_path / "out.safetensors", Wanted(rank=2))
    assert not (tmp_path / "out.safetensors").exists()
