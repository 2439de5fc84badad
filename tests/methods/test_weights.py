"""LoRA as a method: which layers, what size, from where, and what it leaves."""

from __future__ import annotations

import math
import re
from typing import Any

import pydantic
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.attach import attach
from impasto.deltas.lowrank import LowRank
from impasto.families.base import Base
from impasto.methods import METHODS
from impasto.methods.lora import LoRA

WORDS = {"attention": r"^unet\..*to_[qv]$", "text-encoder": r"^text_encoder\..*proj$", "all": r"^unet\."}


class Stub(Base):
    """Two small components; of a base it knows what methods ask for."""

    family = "stub"
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)

    def __init__(self) -> None:
        torch.manual_seed(0)
        block = {"to_q": nn.Linear(8, 8), "to_v": nn.Linear(8, 8), "ff": nn.Linear(8, 12)}
        self.components = {
            "unet": nn.ModuleDict({"down": nn.ModuleDict(block), "up": nn.ModuleDict(
                {"to_q": nn.Linear(12, 8), "conv": nn.Conv2d(4, 3, 3), "same": block["to_q"]})}),
            "text_encoder": nn.ModuleDict({"q_proj": nn.Linear(6, 6)}),
            "vae": nn.Linear(2, 2),
        }
        for module in self.components.values():
            module.requires_grad_(False)

    def targets(self, word: str) -> list[str]:
        paths = [f"{name}.{path}" for name, root in self.components.items()
                 for path, module in root.named_modules(remove_duplicate=False)
                 if isinstance(module, (nn.Linear, nn.Conv2d))]
        found = [path for path in paths if re.search(WORDS.get(word, word), path)]
        if not found:
            raise UserError(f"{word!r} names no layer")
        return found

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.components["unet"]["down"], self.components["unet"]["up"]
        return up["to_q"](down["ff"](down["to_q"](x) * down["to_v"](x).tanh()))


Stub.__abstractmethods__ = frozenset()


def lora(**options: Any) -> LoRA:
    return LoRA(LoRA.Options.model_validate({"kind": "lora", "rank": 4, **options}))


def prepared(seed: int = 0, **options: Any) -> tuple[Stub, LoRA, list[dict[str, Any]]]:
    base, method = Stub(), lora(**options)
    return base, method, method.prepare(base, seed)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


# --- which layers, what size --------------------------------------------------------------------------------


def test_the_default_is_attention_at_the_strength_of_the_factors() -> None:
    base, method, groups = prepared()
    assert list(method.modules()) == ["unet.down.to_q", "unet.down.to_v", "unet.up.to_q"]
    assert all(isinstance(d, LowRank) and d.rank == d.alpha == 4 and d.scale == 1 for d in method.deltas.values())
    assert method.trains(base) == {"unet"}
    (group,) = groups
    assert group["lr"] is None and group["name"] == "lora unet"
    assert sum(p.numel() for p in group["params"]) == 4 * (16 + 16 + 20)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in group["params"])


def test_a_new_adapter_leaves_the_base_as_it_is() -> None:
    base, _, _ = prepared(targets=["all", "text-encoder"], exclude=["conv"])
    assert torch.equal(base.forward(X), Stub().forward(X))


def test_patterns_set_ranks_and_alphas_and_leave_layers_out() -> None:
    _, method, _ = prepared(targets=["all", "q_proj"], alpha=2.0, exclude=[r"up\.to_q"],
                            ranks={"conv": 0, r"\.ff$": 3, "down": 5}, alphas={"to_v": 7, "down": 1.5})
    sizes = {path: (d.rank, d.alpha) for path, d in method.deltas.items()}
    assert sizes == {"unet.down.to_q": (5, 1.5), "unet.down.to_v": (5, 7.0), "unet.down.ff": (3, 1.5),
                     "text_encoder.q_proj": (4, 2.0)}


def test_patterns_are_peft_s() -> None:
    """Ranks, alphas and scales of peft, rank-stabilised, with the same patterns."""
    _, method, _ = prepared(targets=["down"], rank=6, alpha=3.0, rslora=True, ranks={"to_q": 2, "ff": 5},
                            alphas={"to_v": 9})
    config = LoraConfig(target_modules=["to_q", "to_v", "ff"], r=6, lora_alpha=3, use_rslora=True,
                        rank_pattern={"to_q": 2, "ff": 5}, alpha_pattern={"to_v": 9})
    theirs = get_peft_model(nn.Sequential(Stub().components["unet"]["down"]), config).base_model.model[0]
    for path, delta in method.deltas.items():
        layer = theirs[path.rpartition(".")[2]]
        assert (delta.rank, delta.alpha, delta.scale) == (
            layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"])


def test_without_alpha_each_layer_has_its_own_rank_for_it() -> None:
    _, method, _ = prepared(ranks={"to_v": 8}, rslora=True)
    assert {path: d.scale for path, d in method.deltas.items()} == pytest.approx({
        "unet.down.to_q": 2.0, "unet.down.to_v": math.sqrt(8), "unet.up.to_q": 2.0})


def test_a_layer_under_two_names_is_trained_once() -> None:
    _, method, _ = prepared(targets=["to_q", "same"])
    assert list(method.deltas) == ["unet.down.to_q", "unet.up.to_q"]


# --- initial values -----------------------------------------------------------------------------------------


def test_initial_values_are_a_function_of_seed_and_path_alone() -> None:
    (_, one, _), (_, two, _), (_, other, _) = prepared(3), prepared(3, targets=["to_v"]), prepared(4)
    torch.manual_seed(9)
    assert torch.equal(one.deltas["unet.down.to_v"].down, two.deltas["unet.down.to_v"].down)
    assert not torch.equal(one.deltas["unet.down.to_v"].down, other.deltas["unet.down.to_v"].down)
    assert not torch.equal(one.deltas["unet.down.to_v"].down, one.deltas["unet.down.to_q"].down)
    state = torch.get_rng_state()
    prepared(3)
    torch.manual_seed(9)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_fp32_on_a_bf16_base() -> None:
    base, method = Stub(), lora()
    base.components["unet"].to(torch.bfloat16)
    (group,) = method.prepare(base, 0)
    assert all(p.dtype == torch.float32 for p in group["params"])
    base.forward(X.bfloat16()).float().sum().backward()
    assert all(d.up.grad is not None for d in method.deltas.values())


def test_a_step_can_be_traced_without_numbers() -> None:
    """On fake tensors, as a forecast of memory does it."""
    with FakeTensorMode():
        base, method, _ = prepared(dropout=0.1)
        base.forward(torch.randn(5, 8)).square().sum().backward()
        assert all(d.down.grad is not None for d in method.deltas.values())


# --- rates --------------------------------------------------------------------------------------------------


def test_text_encoders_may_have_a_rate_of_their_own() -> None:
    base, method, groups = prepared(targets=["attention", "text-encoder"], learning_rate=1e-4,
                                    text_encoder_learning_rate=1e-5)
    assert method.trains(base) == {"unet", "text_encoder"}
    assert {group["name"]: group["lr"] for group in groups} == {"lora unet": 1e-4, "lora text_encoder": 1e-5}
    _, _, groups = prepared(targets=["attention", "text-encoder"], learning_rate=1e-4)
    assert [group["lr"] for group in groups] == [1e-4, 1e-4]


# --- training and what it leaves ----------------------------------------------------------------------------


def test_what_is_trained_is_what_the_adapter_says() -> None:
    base, method, groups = prepared(dropout=0.2)
    optimizer = torch.optim.SGD([{"params": g["params"]} for g in groups], lr=0.3)
    for _ in range(4):
        base.forward(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(d.up.any() for d in method.deltas.values())
    adapter = method.adapter()
    assert adapter.family == "stub" and adapter.layers == list(method.deltas)
    for module in method.modules().values():
        module.eval()
    trained = base.forward(X).detach()
    fresh = Stub()
    attach(fresh.components, adapter)
    assert_close(fresh.forward(X), trained)
    attach(fresh.components, adapter * -1).merge()
    assert torch.allclose(fresh.forward(X), Stub().forward(X), atol=1e-5)
    before = adapter.dense("unet.down.to_q").clone()
    with torch.no_grad():
        method.deltas["unet.down.to_q"].up.zero_()
    assert torch.equal(adapter.dense("unet.down.to_q"), before)  # a copy, not a view of what trains on
    assert not any(p.requires_grad for terms in adapter.deltas.values() for t in terms for p in t.parameters())


def test_a_checkpoint_of_the_modules_restores_the_method() -> None:
    (base, one, _), (other, two, _) = prepared(1), prepared(2)
    with torch.no_grad():
        for delta in one.deltas.values():
            delta.up.normal_()
    for name, module in two.modules().items():
        module.load_state_dict(one.modules()[name].state_dict())
    assert torch.equal(base.forward(X), other.forward(X))


def test_the_base_alone_for_a_frozen_teacher() -> None:
    base, method, _ = prepared()
    with torch.no_grad():
        for delta in method.deltas.values():
            delta.up.normal_()
    method.attachment.enabled = False
    assert torch.equal(base.forward(X), Stub().forward(X))
    method.attachment.enabled = True
    assert not torch.allclose(base.forward(X), Stub().forward(X))


# --- what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    ({"targets": ["nonsense"]}, "'nonsense' names no layer"),
    ({"targets": ["conv"], "rank": 4}, r"unet.up.conv: rank 4 .* smaller side being 3.*unet\[.\]up\[.\]conv"),
    ({"rank": 9}, "unet.down.to_q: rank 9 .* smaller side being 8"),
    ({"ranks": {"nonsense": 2}}, "'nonsense' names no layer"),
    ({"ranks": {"conv": 2}}, "ranks: 'conv' names no layer that is a target"),
    ({"alphas": {"ff": 2}}, "alphas: 'ff' names no layer that is a target"),
    ({"exclude": ["vae"]}, "exclude: 'vae' names no layer that is a target"),
    ({"exclude": ["attention"]}, "method lora: no layer is left"),
    ({"text_encoder_learning_rate": 1e-5}, "text_encoder_learning_rate: no layer of a text encoder"),
])
def test_options_that_do_not_fit_the_base(options: dict[str, Any], said: str) -> None:
    base, method = Stub(), lora(**options)
    with pytest.raises(UserError, match=said):
        method.prepare(base, 0)
    assert torch.equal(base.forward(X), Stub().forward(X))


@pytest.mark.parametrize("options", [
    {"rank": 0}, {"rank": 2.5}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"targets": []},
    {"ranks": {"a": -1}}, {"alphas": {"a": 0}}, {"learning_rate": 0}, {"text_encoder_learning_rate": -1},
    {"rnak": 4}, {"kind": "loha"},
])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        lora(**options)


def test_every_option_of_every_method_is_explained() -> None:
    for kind in METHODS:
        for name, field in METHODS.get(kind).Options.model_fields.items():
            assert name == "kind" or field.description, f"{kind}.{name}"
