"""Attached = merged = a changed weight, on any module; and nothing is left behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach
from impasto.deltas.layers import shape_of, weight_of
from tests.deltas.layers import LAYERS, dense_of, make_delta, make_input, make_layer, with_weight
from tests.deltas.test_adapter import Quotient


class Net(nn.Module):
    """Every kind of layer at work, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.again = self.block[0]
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.look(ids).mT).mT)
        return self.block(x) + self.again(x)[..., :8]


IDS = torch.tensor([[1, 2, 3], [4, 0, 10]])
PATHS = ["look", "conv", "block.0", "block.2"]


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double().requires_grad_(False)


def adapter_for(module: nn.Module, paths: list[str], seed: int = 0, *, prefix: str = "", small: float = 1.0,
                dtype: torch.dtype = torch.float64) -> Adapter:
    shapes = {path: shape_of(module.get_submodule(path)) for path in paths}
    return Adapter({prefix + path: (make_delta(shape, 3, 2.0 * small, seed + i, dtype=dtype),)
                    for i, (path, shape) in enumerate(shapes.items())})


def changed(module: nn.Module, adapter: Adapter, strength: float = 1.0) -> nn.Module:
    """A copy with dense changes in its weights: the reference."""
    module = copy.deepcopy(module)
    for path, terms in adapter.deltas.items():
        layer = module.get_submodule(path)
        dW = strength * sum(dense_of(term) for term in terms)
        with torch.no_grad():
            weight_of(layer).add_(dW.to(layer.weight.dtype))
    return module


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str) -> None:
    layer, x = make_layer(kind), make_input(make_layer(kind))
    delta, before = make_delta(shape_of(layer)), layer(x)
    want = with_weight(layer, dense_of(delta))(x)
    attachment = attach({"only": layer}, {"only": delta})
    assert_close(layer(x), want)
    attachment.detach()
    assert torch.equal(layer(x), before)
    attach(layer, {"": delta}).merge()
    assert_close(layer(x), want)


def test_attached_is_merged_is_the_reference() -> None:
    net = make_net()
    adapter, before, names = adapter_for(net, PATHS), net(IDS), list(net.state_dict())
    want = changed(net, adapter, 0.7)(IDS)
    attachment = attach(net, adapter, 0.7)
    assert_close(net(IDS), want)
    assert list(net.state_dict()) == names and [n for n, _ in net.named_modules()] == [
        n for n, _ in make_net().named_modules()]
    attachment.enabled = False
    assert torch.equal(net(IDS), before)
    attachment.enabled = True
    assert_close(net(IDS), want)
    attachment.detach()
    attachment.detach()
    assert torch.equal(net(IDS), before)
    assert not any("forward" in module.__dict__ for module in net.modules())
    attach(net, adapter * 0.7).merge()
    assert_close(net(IDS), want)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_several_modules_by_name_and_a_context() -> None:
    one, two = make_net(), make_net()
    adapter = adapter_for(one, ["conv"], prefix="unet.") + adapter_for(two, ["block.2"], prefix="text_encoder.")
    before = one(IDS)
    with attach({"unet": one, "text_encoder": two}, adapter):
        assert_close(one(IDS), changed(make_net(), adapter_for(one, ["conv"]))(IDS))
        assert_close(two(IDS), changed(make_net(), adapter_for(two, ["block.2"]))(IDS))
    assert torch.equal(one(IDS), before) and torch.equal(two(IDS), before)


def test_attachments_stack_and_come_off_in_any_order() -> None:
    net = make_net()
    a, b, c = (adapter_for(net, PATHS[i:], seed=10 * i) for i in range(3))
    on = [attach(net, x) for x in (a, b, c)]
    assert_close(net(IDS), changed(make_net(), a + b + c)(IDS))
    on[1].enabled = False
    assert_close(net(IDS), changed(make_net(), a + c)(IDS))
    on[0].detach()
    assert_close(net(IDS), changed(make_net(), c)(IDS))
    on[1].enabled = True
    on[2].merge()
    assert_close(net(IDS), changed(make_net(), b + c)(IDS))
    on[1].detach()
    assert_close(net(IDS), changed(make_net(), c)(IDS))


def test_a_layer_under_two_names_is_one_layer() -> None:
    """A delta under each name: both count, once, attached and merged alike."""
    net = make_net()
    adapter = adapter_for(net, ["block.0", "again"])
    want = changed(net, adapter)(IDS)
    attachment = attach(net, adapter)
    assert_close(net(IDS), want)
    attachment.merge()
    assert_close(net(IDS), want)


def test_terms_that_see_the_base_s_weight_see_it_without_the_others() -> None:
    """dW = W / 2 beside a LoRA, attached and merged."""
    net = make_net()
    lora, shape = adapter_for(net, ["block.2"]), shape_of(net.block[2])
    deltas = {"block.2": (*lora.deltas["block.2"], Quotient(shape))}
    reference = changed(net, lora)
    with torch.no_grad():
        reference.block[2].weight += net.block[2].weight / 2
    attachment = attach(net, deltas)
    assert_close(net(IDS), reference(IDS))
    attachment.merge()
    assert_close(net(IDS), reference(IDS))


def test_somebody_else_s_wrapper_survives() -> None:
    """accelerate wraps forwards too: before us and after us."""
    net = make_net()
    calls = []

    def wrapped(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        calls.append(1)
        return forward(x)

    layer, adapter, before = net.block[2], adapter_for(net, ["block.2"]), net(IDS)
    layer.forward = functools.partial(wrapped, layer.forward)
    attachment = attach(net, adapter)
    layer.forward = functools.partial(wrapped, layer.forward)
    second = attach(net, adapter)
    assert_close(net(IDS), changed(make_net(), adapter * 2)(IDS))
    assert len(calls) == 2
    attachment.detach()
    second.detach()
    assert torch.equal(net(IDS), before)
    assert len(calls) == 4


def test_a_copy_carries_copies_of_the_deltas() -> None:
    """Moving averages of weights and the like copy whole modules."""
    net = make_net()
    attachment = attach(net, adapter_for(net, PATHS))
    twin, want = copy.deepcopy(net), net(IDS)
    attachment.detach()
    assert_close(twin(IDS), want)
    assert not torch.allclose(net(IDS), want)


def test_input_by_keyword() -> None:
    layer, x = make_layer("linear"), make_input(make_layer("linear"))
    with attach(layer, {"": make_delta((5, 6))}):
        assert torch.equal(layer(input=x), layer(x))


# --- training -----------------------------------------------------------------------------------------------


def gradients(net: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    net(IDS).square().sum().backward()
    found = {}
    for path, (delta,) in adapter.deltas.items():
        for name, parameter in delta.named_parameters():
            found[f"{path}.{name}"], parameter.grad = parameter.grad, None
    return found


def trainable(net: nn.Module, dtype: torch.dtype = torch.float64) -> Adapter:
    adapter = adapter_for(net, PATHS, dtype=dtype)
    for (delta,) in adapter.deltas.values():
        delta.requires_grad_(True)
    return adapter


def test_gradients_are_those_of_a_changed_weight() -> None:
    net = make_net()
    adapter = trainable(net)
    with attach(net, adapter):
        got = gradients(net, adapter)
    weights = {f"{path}.weight": weight_of(net.get_submodule(path)) + terms[0].weight()
               for path, terms in adapter.deltas.items()}
    weights["look.weight"] = weights["look.weight"].T
    weights["again.weight"] = weights["block.0.weight"]
    torch.func.functional_call(net, weights, (IDS,), tie_weights=False).square().sum().backward()
    for path, (delta,) in adapter.deltas.items():
        for name, parameter in delta.named_parameters():
            assert_close(got[f"{path}.{name}"], parameter.grad)


def test_gradient_checkpointing_changes_nothing() -> None:
    net = make_net()
    adapter = trainable(net)
    with attach(net, adapter):
        plain = gradients(net, adapter)
        own = net.block.forward
        net.block.forward = functools.partial(checkpoint, own, use_reentrant=False)
        assert all(torch.equal(a, b) for a, b in zip(plain.values(), gradients(net, adapter).values(), strict=True))


@pytest.mark.slow
def test_a_compiled_module_sees_every_change() -> None:
    net = make_net().float()
    adapter = trainable(net, torch.float32)
    compiled = torch.compile(net)

    def same() -> None:
        assert_close(compiled(IDS), net(IDS), rtol=1e-4, atol=1e-4)

    same()
    before = net(IDS)
    attachment = attach(net, adapter)
    same()
    assert not torch.allclose(net(IDS), before)
    plain = gradients(net, adapter)
    for name, gradient in gradients(compiled, adapter).items():
        assert_close(gradient, plain[name], rtol=1e-3, atol=1e-3)
    attachment.enabled = False
    same()
    attachment.enabled = True
    second = attach(net, adapter, 0.5)
    same()
    attachment.detach()
    same()
    second.detach()
    same()
    assert torch.equal(net(IDS), before)


# --- precision ----------------------------------------------------------------------------------------------


def test_merging_adds_in_fp32_and_casts_once() -> None:
    """Two changes, each below half a unit in the last place of bf16, which together are above it."""
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    small = Adapter({"": (make_delta((8, 8), dtype=torch.float32),)})
    for name, value in (("up", 1.0), ("down", 0.003 / 2)):  # rank 3, alpha 2: dW = 0.003
        getattr(small.deltas[""][0], name).fill_(value)
    both = {"": (*small.deltas[""], *small.deltas[""])}
    attach(layer, both).merge()
    assert layer.weight.dtype == torch.bfloat16
    assert_close(layer.weight.float(), torch.full((8, 8), 1.0078125))  # 1.006 rounded; 1.003 would round to 1


# --- real networks ------------------------------------------------------------------------------------------


def vit() -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
        patch_size=8, num_labels=5)).eval().requires_grad_(False)
    pixels = torch.randn(2, 3, 32, 32)
    return model, lambda m: m(pixels).logits, [
        name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def gpt2() -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=4,
                                       bos_token_id=0, eos_token_id=0)).eval().requires_grad_(False)
    ids = torch.arange(20).reshape(2, 10)
    return model, lambda m: m(ids).logits, [
        name for name, layer in model.named_modules() if type(layer).__name__ == "Conv1D"] + ["transformer.wpe"]


@pytest.mark.parametrize("make", [vit, gpt2])
def test_networks_that_are_not_of_stable_diffusion(make: Callable) -> None:
    model, run, paths = make()
    assert len(paths) > 8
    adapter = adapter_for(model, paths, small=0.1, dtype=torch.float32)
    before, names = run(model), list(model.state_dict())
    want = run(changed(model, adapter))
    attachment = attach(model, adapter)
    attached = run(model)
    assert_close(attached, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert not torch.allclose(attached, before, rtol=1e-2)
    assert list(model.state_dict()) == names
    attachment.merge()
    assert_close(run(model), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


# --- what cannot be done ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "shape", "said"), [
    ("blok.0", (16, 8), "blok.0.*no such layer.*did you mean 'block.0'"),
    ("norm", (8, 8), "norm.*LayerNorm, which cannot carry"),
    ("block", (8, 8), "block.*Sequential, which cannot carry"),
    ("block.0", (8, 16), r"block.0.*\(16, 8\).*\(8, 16\).*another base"),
    ("conv", (8, 8), r"conv.*\(8, 8, 3\).*\(8, 8\)"),
])
def test_what_does_not_fit_changes_nothing(path: str, shape: tuple[int, ...], said: str) -> None:
    net = make_net()
    before = net(IDS)
    deltas = {"block.2": make_delta((8, 16)), path: make_delta(shape)}
    with pytest.raises(UserError, match=said):
        attach(net, deltas)
    assert torch.equal(net(IDS), before)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_a_component_that_is_not_there() -> None:
    with pytest.raises(UserError, match="unet_2.conv.*did you mean 'unet'"):
        attach({"unet": make_net()}, {"unet_2.conv": make_delta((8, 8, 3))})


def test_layers_that_would_ignore_a_delta() -> None:
    with pytest.raises(UserError, match="out_proj.*MultiheadAttention"):
        attach(nn.MultiheadAttention(8, 2), {"out_proj": make_delta((8, 8))})
    with pytest.raises(UserError, match="max_norm"):
        attach(nn.Embedding(5, 4, max_norm=1.0), {"": make_delta((4, 5))})


def test_merging_into_a_shared_weight_is_refused() -> None:
    model, run, _ = gpt2()
    before = run(model)
    attachment = attach(model, adapter_for(model, ["transformer.h.0.attn.c_attn", "transformer.wte"],
                                           dtype=torch.float32))
    with pytest.raises(UserError, match="transformer.wte.*shares its weight with lm_head"):
        attachment.merge()
    attachment.detach()
    assert torch.equal(run(model), before)
