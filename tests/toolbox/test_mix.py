"""Sums of adapters against sums in fp64, whatever kinds they are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.ranks import Wanted
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.toolbox.blocks import Blocks
from impasto.toolbox.merge import merge_adapters
from impasto.toolbox.mix import mix, resize
from tests.formats.adapter_cases import random_adapter
from tests.formats.checkpoint_cases import tensors_of
from tests.formats.kind_cases import adapter_of_kind


def saved(adapter: Adapter, path: Path) -> Weighted:
    save_adapter(adapter, path, dtype=torch.float32)
    return Weighted(str(path))


def flat(adapter: Adapter, layer: str) -> Tensor:
    return adapter.dense(layer).double().flatten()


LINEAR = ("lora", "lora-tucker", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-full", "lokr-tucker", "dense")


@pytest.mark.parametrize("one", LINEAR)
@pytest.mark.parametrize("other", ["lora", "loha", "lokr-full", "dense"])
def test_a_sum_is_exact(one: str, other: str, tmp_path: Path) -> None:
    adapters = [adapter_of_kind(one), random_adapter(seed=5) if other == "lora" else adapter_of_kind(other)]
    files = [saved(adapter, tmp_path / f"{i}.safetensors") for i, adapter in enumerate(adapters)]
    made = mix([Weighted(files[0].path, 0.7), Weighted(files[1].path, -0.4)], tmp_path / "out.safetensors",
               dtype=torch.float32)
    found = load_adapter(tmp_path / "out.safetensors")
    assert set(found.layers) == set(adapters[0].layers)
    assert not made.layers
    for layer in found.layers:
        wanted = 0.7 * flat(adapters[0], layer) - 0.4 * flat(adapters[1], layer)
        torch.testing.assert_close(flat(found, layer), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_strengths_are_not_squared(tmp_path: Path) -> None:
    """The field's trap: scaling up and down both turns 0.5 into 0.25."""
    file = saved(random_adapter(), tmp_path / "a.safetensors")
    mix([Weighted(file.path, 0.5), Weighted(file.path, 0.5)], tmp_path / "out.safetensors", dtype=torch.float32)
    found, plain = load_adapter(tmp_path / "out.safetensors"), random_adapter()
    for layer in plain.layers:
        torch.testing.assert_close(flat(found, layer), flat(plain, layer), rtol=1e-4, atol=1e-6)


def test_a_sum_at_a_rank_is_the_best_of_that_rank(tmp_path: Path) -> None:
    adapters = [random_adapter(seed=1), random_adapter(seed=2)]
    files = [saved(adapter, tmp_path / f"{i}.safetensors") for i, adapter in enumerate(adapters)]
    made = mix(files, tmp_path / "out.safetensors", wanted=Wanted(rank=2), dtype=torch.float32)
    found = load_adapter(tmp_path / "out.safetensors")
    for layer in found.layers:
        whole = adapters[0].dense(layer).double().flatten(1) + adapters[1].dense(layer).double().flatten(1)
        values = torch.linalg.svdvals(whole)
        least = float((values[2:].square().sum() / values.square().sum()).sqrt())
        gap = float((found.dense(layer).double().flatten(1) - whole).norm() / whole.norm())
        assert gap == pytest.approx(least, abs=1e-4) == pytest.approx(made.layers[layer].error, abs=1e-3)
    assert 0 < made.error < 1


def test_blocks_and_what_is_left_of_them(tmp_path: Path) -> None:
    files = [saved(random_adapter(seed=i), tmp_path / f"{i}.safetensors") for i in (1, 2)]
    mix(files, tmp_path / "out.safetensors", blocks=Blocks.parse("text_encoder=0,M00=0.5"), dtype=torch.float32)
    found, one, two = (load_adapter(path) for path in (tmp_path / "out.safetensors", *(f.path for f in files)))
    assert not any(layer.startswith("text") for layer in found.layers)
    layer = "unet.mid_block.resnets.1.conv2"
    torch.testing.assert_close(flat(found, layer), 0.5 * (flat(one, layer) + flat(two, layer)), rtol=1e-4, atol=1e-6)


def test_a_dora_asks_for_the_base_and_does_there_what_it_did(written: Callable[..., Path], tmp_path: Path) -> None:
    dora = saved(adapter_of_kind("dora"), tmp_path / "d.safetensors")
    lora = saved(random_adapter(), tmp_path / "l.safetensors")
    with pytest.raises(UserError, match="give the base that it is for"):
        mix([dora, lora], tmp_path / "out.safetensors")
    mix([dora, Weighted(lora.path, 0.5)], tmp_path / "out.safetensors", base=written(), dtype=torch.float32)
    out = Weighted(str(tmp_path / "out.safetensors"))
    merge_adapters(written(), [out], tmp_path / "one.safetensors")
    merge_adapters(written(), [dora, Weighted(lora.path, 0.5)], tmp_path / "both.safetensors")
    one, both = (tensors_of(open_checkpoint(tmp_path / name)) for name in ("one.safetensors", "both.safetensors"))
    for name in one:
        torch.testing.assert_close(one[name], both[name], rtol=1e-4, atol=1e-5)


def test_tokens_and_hypernetworks_are_carried_along(tmp_path: Path) -> None:
    tokens = {"<cat>": {"text_encoder": torch.randn(2, 32)}}
    one = saved(replace(random_adapter(seed=1), embeddings=tokens), tmp_path / "1.safetensors")
    other = saved(random_adapter(seed=2), tmp_path / "2.safetensors")
    for wanted in (None, Wanted(rank=1)):
        mix([one, other], tmp_path / "out.safetensors", wanted=wanted, dtype=torch.float32, force=True)
        found = load_adapter(tmp_path / "out.safetensors")
        assert torch.equal(found.embeddings["<cat>"]["text_encoder"], tokens["<cat>"]["text_encoder"])


@pytest.mark.parametrize("kind", ["loha", "lokr", "dense", "mixed"])
def test_any_kind_is_resized(kind: str, written: Callable[..., Path], tmp_path: Path) -> None:
    adapter = adapter_of_kind(kind) if kind != "mixed" else adapter_of_kind("dora")
    file = saved(adapter, tmp_path / "a.safetensors")
    made = resize(file.path, Wanted(energy=0.9), tmp_path / "out.safetensors", base=written(), dtype=torch.float32)
    assert all(kept.error <= (1 - 0.9**2) ** 0.5 + 1e-4 for kept in made.layers.values())
    found = load_adapter(tmp_path / "out.safetensors")
    assert {term.kind for terms in found.deltas.values() for term in terms if term.shape} == {"lora"}


def test_a_size_is_kept_to(tmp_path: Path) -> None:
    file = saved(random_adapter(), tmp_path / "a.safetensors")
    whole = Path(file.path).stat().st_size // 2
    resize(file.path, Wanted(size=whole // 2), tmp_path / "out.safetensors")
    bytes_ = sum(t.numel() * 2 for terms in load_adapter(tmp_path / "out.safetensors").deltas.values() for term in terms
                 for name, t in term.tensors().items() if name != "alpha")
    assert 0.8 * whole / 2 < bytes_ <= whole / 2


def test_what_cannot_be_mixed_is_one_line(tmp_path: Path) -> None:
    one = saved(random_adapter(), tmp_path / "1.safetensors")
    xl = saved(random_adapter(family="sdxl", text=False), tmp_path / "xl.safetensors")
    layers = random_adapter(text=False).deltas
    apart = [saved(Adapter({name: layers[name] for name in chosen}, family="sd1"), tmp_path / f"{i}-half.safetensors")
             for i, chosen in enumerate(([*layers][:3], [*layers][3:]))]
    with pytest.raises(UserError, match="is for sdxl, and 1.safetensors is for sd1"):
        mix([one, xl], tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="shares no layer with 0-half"):
        mix(apart, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="is one of the inputs"):
        mix([one], one.path, force=True)
    with pytest.raises(UserError, match="ranks are 6 at most"):
        resize(one.path, Wanted(rank=7), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
