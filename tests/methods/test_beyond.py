"""What LoRA-like methods do beyond plain LoRA, against peft, the library's optimizers, or closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.attach import attach
from impasto.deltas.departure import Departure, principal
from impasto.deltas.dora import Dora
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.methods import METHODS
from impasto.methods.norms import limit, norm_of
from impasto.methods.warm import take_over
from impasto.methods.weights import LayerMethod
from impasto.training.optimizers import OPTIMIZERS, make_optimizer
from impasto.training.sections import TrainOptions
from tests.families.conftest import random_sd1
from tests.methods.test_weights import Stub, X

ALL = ["lora", "loha", "lokr"]


def method(kind: str = "lora", **options: Any) -> LayerMethod:
    cls = METHODS.get(kind)
    return cls(cls.Options.model_validate({"kind": kind, "rank": 2, **options}))


def begun(kind: str = "lora", seed: int = 0, **options: Any) -> tuple[Stub, LayerMethod, list[dict[str, Any]]]:
    base, made = Stub(), method(kind, **options)
    return base, made, made.prepare(base, seed)


def trained(kind: str = "lora", steps: int = 3, **options: Any) -> tuple[Stub, LayerMethod]:
    base, made, groups = begun(kind, **options)
    optimizer = torch.optim.Adam([p for group in groups for p in group["params"]], lr=0.02)
    for _ in range(steps):
        base.forward(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, made


# --- DoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("kind", ALL)
def test_dora_begins_as_the_base_and_says_all_it_has_learned(kind: str, axis: str) -> None:
    base, made, _ = begun(kind, dora=True, dora_axis=axis)
    assert_close(base.forward(X), Stub().forward(X), rtol=1e-6, atol=1e-6)
    base, made = trained(kind, dora=True, dora_axis=axis)
    adapter = made.adapter()
    assert all(not term.linear for terms in adapter.deltas.values() for term in terms)
    fresh = Stub()
    attach(fresh.components, adapter)
    assert_close(fresh.forward(X), base.forward(X).detach())
    assert not torch.allclose(fresh.forward(X), Stub().forward(X), atol=1e-3)


def test_dora_is_peft_s() -> None:
    base, made = trained(dora=True, targets=[r"down\.(?:to_q|to_v|ff)$"])
    config = LoraConfig(target_modules=["to_q", "to_v", "ff"], r=2, lora_alpha=2, use_dora=True)
    theirs = Stub()
    model = get_peft_model(nn.Sequential(theirs.components["unet"]["down"]), config).base_model.model[0]
    with torch.no_grad():
        for path, delta in made.deltas.items():
            layer = model[path.rpartition(".")[2]]
            assert isinstance(delta, Dora) and isinstance(delta.inner, LowRank)
            assert_close(layer.lora_magnitude_vector["default"].weight,
                         torch.linalg.vector_norm(Stub().layer(path).weight, dim=1))  # what ours began with too
            layer.lora_A["default"].weight.copy_(delta.inner.down)
            layer.lora_B["default"].weight.copy_(delta.inner.up)
            layer.lora_magnitude_vector["default"].weight.copy_(delta.magnitude[:, 0])
        ours, other = base.components["unet"]["down"], model
        for name in ("to_q", "to_v", "ff"):
            assert_close(ours[name](X), other[name](X))


# --- LoRA+ ------------------------------------------------------------------------------------------------------


def test_loraplus_rates_are_peft_s() -> None:
    _, _, groups = begun(loraplus_ratio=16, targets=["down"])
    ours = make_optimizer(groups, TrainOptions.model_validate({"learning_rate": 1e-4}), torch.device("cpu"))
    rates = {"plus" in group["name"]: group["lr"] for group in ours.param_groups}
    model = get_peft_model(nn.Sequential(Stub().components["unet"]["down"]),
                           LoraConfig(target_modules=["to_q", "to_v", "ff"], r=2))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    by_shape = {name.split(".")[-3]: group["lr"] for group in theirs.param_groups for p in group["params"]
                for name, q in model.named_parameters() if q is p}
    assert rates == {False: by_shape["lora_A"], True: by_shape["lora_B"]} == {False: 1e-4, True: 16e-4}
    assert {path.rpartition(".")[2] for g in groups if "plus" in g["name"] for path in g["paths"]} == {"up"}


def test_loraplus_in_text_encoders_and_where_there_is_none() -> None:
    _, _, groups = begun(loraplus_ratio=16, text_encoder_loraplus_ratio=4, learning_rate=1.0,
                         targets=["attention", "text-encoder"])
    made = make_optimizer(groups, TrainOptions.model_validate({}), torch.device("cpu"))
    assert {g["name"]: g["lr"] for g in made.param_groups} == {
        "lora unet": 1, "lora unet plus": 16, "lora text_encoder": 1, "lora text_encoder plus": 4}
    for kind in ("loha", "lokr"):
        with pytest.raises(UserError, match=f"method {kind}: loraplus_ratio"):
            begun(kind, loraplus_ratio=16)


# --- PiSSA ------------------------------------------------------------------------------------------------------


def test_pissa_begins_at_peft_s_values_and_as_the_base_to_the_bit() -> None:
    base, made, _ = begun(init="pissa", rank=3, targets=[r"down\.(?:to_q|to_v|ff)$"])
    assert torch.equal(base.forward(X), Stub().forward(X))
    config = LoraConfig(target_modules=["to_q", "to_v", "ff"], r=3, lora_alpha=3, init_lora_weights="pissa")
    theirs = get_peft_model(nn.Sequential(Stub().components["unet"]["down"]), config).base_model.model[0]
    for path, delta in made.deltas.items():
        layer = theirs[path.rpartition(".")[2]]
        assert isinstance(delta, Departure)
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert_close(delta.learned.up @ delta.learned.down, up @ down, rtol=1e-4, atol=1e-5)
        assert_close(delta.learned.up.abs(), up.abs(), rtol=1e-3, atol=1e-4)  # singular vectors up to their signs
        assert_close(delta.learned.down.abs(), down.abs(), rtol=1e-3, atol=1e-4)


def test_pissa_leaves_twice_the_rank_that_half_precision_does_not_spoil() -> None:
    base, made = trained(init="pissa", rank=3, steps=2)
    adapter = made.adapter()
    assert {term.rank for terms in adapter.deltas.values() for term in terms if isinstance(term, LowRank)} == {6}
    fresh = Stub()
    attach(fresh.components, adapter)
    assert_close(fresh.forward(X), base.forward(X).detach())
    for path, delta in made.deltas.items():
        assert isinstance(delta, Departure)
        learned = delta.learned.requires_grad_(False)
        dW = (learned.up.flatten(1).double() @ learned.down.flatten(1).double()
              - delta.up0.flatten(1).double() @ delta.down0.flatten(1).double()).view(delta.shape)
        (term,) = adapter.deltas[path]
        assert_close(term.weight().double(), dW, rtol=1e-4, atol=1e-6)
        assert isinstance(term, LowRank)
        half = term.up.half().double().flatten(1) @ term.down.half().double().flatten(1)
        plain = torch.cat([learned.up, -delta.up0], 1).half().double().flatten(1) @ torch.cat(
            [learned.down, delta.down0], 0).half().double().flatten(1)
        lost = float((half - dW.flatten(1)).norm() / dW.norm())
        assert lost < 1e-3 and lost < 0.5 * float((plain - dW.flatten(1)).norm() / dW.norm())


def test_the_fast_decomposition_is_near_the_exact_one() -> None:
    for W in (torch.randn(300, 400, generator=torch.Generator().manual_seed(0)), torch.randn(
            300, 40, generator=torch.Generator().manual_seed(1)) @ torch.randn(40, 500)):
        U, S, Vh = principal(W, 8, torch.Generator().manual_seed(2))
        exact = torch.linalg.svdvals(W.double())[:8]
        assert float((S - exact).abs().max() / exact[0]) < 0.01
        assert_close(U.T @ U, torch.eye(8), atol=1e-5, rtol=0)
        assert_close(U.T @ W, S[:, None] * Vh, atol=1e-3, rtol=1e-3)
        assert torch.equal(principal(W, 8, torch.Generator().manual_seed(2))[0], U)


def test_gaussian_is_of_deviation_one_over_rank() -> None:
    base, made = random_sd1(), method(init="gaussian", rank=4)
    made.prepare(base, 0)
    drawn = torch.cat([parameter.detach().flatten() for delta in made.deltas.values()
                       for name, parameter in delta.named_parameters() if name == "down"])
    assert abs(float(drawn.std()) - 0.25) < 0.02 and abs(float(drawn.mean())) < 0.02


# --- rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "total", "step"), [(3, 10, 3), (0.25, 10, 3), (0.5, 4, 2)])
def test_the_text_encoder_rests_from_a_step_on(stop: float, total: int, step: int) -> None:
    _, made, _ = begun(text_encoder_stop=stop, targets=["attention", "text-encoder"])
    made.begin(total)
    assert list(made.resting(step - 1)) == []
    text = [p for path, d in made.deltas.items() if path.startswith("text_encoder") for p in d.parameters()]
    assert {id(p) for p in made.resting(step)} == {id(p) for p in text} != set()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_rests_stays_as_it_is_to_the_bit(name: str) -> None:
    """In every optimizer's hands, moments and weight decay included."""
    pytest.importorskip(OPTIMIZERS[name].path.partition(":")[0])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))
    options = TrainOptions.model_validate({"optimizer": name, "device": "cpu"})
    optimizer = make_optimizer([{"params": list(model.parameters()), "name": "all"}], options, torch.device("cpu"))
    resting, other = model[0].weight, model[2].weight
    for step in range(7):
        before, moved = resting.detach().clone(), other.detach().clone()
        (model(torch.sin(torch.arange(128.0).view(2, 64) * (step + 1))) - 1).square().sum().backward()
        if step >= 3:
            model[0].weight.grad = model[0].bias.grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(resting, before) == (step >= 3), f"step {step}"
        assert not torch.equal(other, moved)


# --- the largest norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"alpha": 5.0}, {"dora": True}])
@pytest.mark.parametrize("kind", ALL)
def test_no_norm_is_above_the_largest(kind: str, options: dict[str, Any]) -> None:
    _, made = trained(kind, targets=["attention", "conv"], max_norm=0.05, **options)
    inner = {path: d.inner if isinstance(d, Dora) else d for path, d in made.deltas.items()}
    before = {path: d.weight().double() for path, d in inner.items()}
    assert any(dW.norm() > 0.05 for dW in before.values())
    for path, delta in inner.items():
        assert_close(norm_of(delta).double(), before[path].norm(), rtol=1e-5, atol=1e-6)
    made.after_step(0)
    for path, delta in inner.items():
        dW = before[path]
        assert_close(delta.weight().double(), dW * (0.05 / dW.norm().clamp(min=0.05)), rtol=1e-4, atol=1e-7)


def test_a_small_change_is_left_as_it_is_to_the_bit() -> None:
    _, made = trained()
    for delta in made.deltas.values():
        before = {name: p.clone() for name, p in delta.named_parameters()}
        limit(delta, 100.0)
        assert all(torch.equal(p, before[name]) for name, p in delta.named_parameters())


# --- warm start -------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, **options: Any) -> tuple[Path, LayerMethod]:
    base, made = random_sd1(), method(targets=["attention"], **options)
    made.prepare(base, 5)
    with torch.no_grad():
        for delta in made.deltas.values():
            for parameter in delta.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    save_adapter(made.adapter(), tmp_path / "dog.safetensors", dtype=torch.float32)
    return tmp_path / "dog.safetensors", made


@pytest.mark.parametrize(("rank", "alpha", "strength"), [(2, None, 1.0), (4, None, 1.0), (3, 1.5, 0.5)])
def test_a_warm_start_means_what_the_file_means(tmp_path: Path, rank: int, alpha: float | None, strength: float
                                                ) -> None:
    path, before = saved(tmp_path)
    base, made = random_sd1(), method(rank=rank, alpha=alpha, warm_start=f"{path}:{strength}")
    made.prepare(base, 0)
    adapter = load_adapter(path)
    for layer, delta in made.deltas.items():
        assert_close(delta.weight(), adapter.dense(layer) * strength)
        assert all(p.requires_grad for p in delta.parameters())
        if (rank, strength) == (2, 1.0):
            ours, theirs = delta.state_dict(), before.deltas[layer].state_dict()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        elif isinstance(delta, LowRank):
            assert delta.down[2:].any() and not delta.up[:, 2:].any()


def test_a_warm_start_under_dora_changes_nothing_either(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    base, made = random_sd1(), method(warm_start=str(path), dora=True)
    made.prepare(base, 0)
    adapter = load_adapter(path)
    for layer, delta in made.deltas.items():
        W = base.layer(layer).weight.detach()
        assert_close(delta.weight(W), adapter.dense(layer), rtol=1e-4, atol=1e-4)


def test_warm_starts_that_cannot_be(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    for options, said in [({"rank": 1}, "rank 2 there, this method 1.*rank=2 fits"),
                          ({"exclude": [r"mid_block"]}, "changes unet.mid_block.*not trained here"),
                          ({"warm_start": str(tmp_path / "none.safetensors")}, "none.safetensors")]:
        with pytest.raises(UserError, match=said):
            method(**{"warm_start": str(path), **options}).prepare(random_sd1(), 0)
    with pytest.raises(UserError, match="a lora there, which a loha"):
        method("loha", warm_start=str(path)).prepare(random_sd1(), 0)


@pytest.mark.parametrize("kind", ALL)
def test_a_kind_takes_its_own_kind(kind: str) -> None:
    (_, old), (_, new, _) = trained(kind, alpha=3.0), begun(kind, seed=9)
    for path, delta in new.deltas.items():
        take_over(delta, (old.deltas[path].snapshot(),), path)
        assert_close(delta.weight(), old.deltas[path].weight())


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"text_encoder_stop": 1.5}, {"text_encoder_stop": 0}, {"loraplus_ratio": 0}, {"max_norm": -1}, {"warm_start": ":2"},
    {"init": "pissa", "dora": True}, {"init": "pissa", "max_norm": 1.0}, {"init": "pissa", "warm_start": "a"},
    {"dora_axis": "both"}, {"init": "zeros"},
])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        method(**options)


@pytest.mark.parametrize("key", ["text_encoder_stop", "text_encoder_loraplus_ratio"])
def test_options_of_a_text_encoder_that_is_not_trained(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: no layer of a text encoder"):
        begun(**{key: 3})
