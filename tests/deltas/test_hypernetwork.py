"""Hypernetworks against the formula in float64, and hooks on layers: what they change, in which order, and what not."""

from __future__ import annotations

import copy
import typing

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.attach import attach, attach_hooks
from impasto.deltas.hypernetwork import ACTIVATIONS, Hypernetwork, dropout_of, initialise
from impasto.methods.hypernetwork import Activation, Beginning
from tests.deltas.layers import make_delta

#: activations by their formulas, in the names of the files
FORMULAS = {
    "linear": lambda x: x, "relu": lambda x: x.clamp(min=0), "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1), "swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "tanh": torch.tanh, "sigmoid": lambda x: 1 / (1 + (-x).exp()), "softsign": lambda x: x / (1 + x.abs()),
    "mish": lambda x: x * torch.tanh((1 + x.exp()).log()),
}


def made(widths: tuple[int, ...] = (6,), structure: tuple[float, ...] = (1, 2, 1), how: str = "normal", seed: int = 0,
         spread: float = 30.0, **options: typing.Any) -> Hypernetwork:
    """In float64, with initial values that are drawn and then spread, so that each of them counts."""
    hook = Hypernetwork(widths, structure, **options)
    draw = torch.Generator().manual_seed(seed)
    for _, _, network in hook.networks():
        initialise(network, how, draw)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += spread * 0.01 * torch.randn(parameter.shape, generator=draw)
    return hook.double()


def reference(hook: Hypernetwork, width: int, name: str, x: Tensor) -> Tensor:
    """x + strength · f(x), from the definition."""
    network = next(n for w, own, n in hook.networks() if (w, own) == (width, name))
    tensors, at, h = list(network.parameters()), 0, x
    for i in range(len(hook.structure) - 1):
        weight, bias = tensors[at:at + 2]
        h, at = torch.einsum("...i,oi->...o", h, weight) + bias, at + 2
        if i < len(hook.structure) - 2 or hook.activate_output:
            h = FORMULAS[hook.activation](h)
        if hook.layer_norm:
            gain, bias = tensors[at:at + 2]
            centred = h - h.mean(-1, keepdim=True)
            h, at = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias, at + 2
    assert at == len(tensors)
    return x + hook.strength * h


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"activate_output": True},
                                     {"layer_norm": True, "activate_output": True, "structure": (1, 1.5, 2, 1)}])
def test_is_the_formula(activation: str, options: dict[str, typing.Any]) -> None:
    hook = made((6, 8), activation=activation, **options).scaled(0.7).scaled(-2.0)
    for width in (6, 8):
        x = torch.randn(2, 5, width, dtype=torch.float64)
        assert_close(hook.keys(x), reference(hook, width, "k", x))
        assert_close(hook.values(x), reference(hook, width, "v", x))
        assert not torch.allclose(hook.keys(x), hook.values(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_runs_and_none_mixes_the_tokens(activation: str) -> None:
    hook = made(structure=(1, 2, 2, 1), activation=activation).eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert_close(hook.keys(x)[1:2, 2:3], hook.keys(x[1:2, 2:3]))


def test_the_recipe_has_the_same_names() -> None:
    assert set(typing.get_args(Activation)) == set(ACTIVATIONS)
    for how in typing.get_args(Beginning):
        initialise(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), how, torch.Generator())


@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "activation": "swish"},
                                     {"activation": "tanh", "activate_output": True}])
def test_gradients(options: dict[str, typing.Any]) -> None:
    """To the context and to each weight, against finite differences."""
    hook = made((3,), **options)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = list(hook.parameters())

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(hook.named_parameters()), weights, strict=True))
        return torch.func.functional_call(Both(hook), {f"hook.{k}": v for k, v in named.items()}, (x,))

    assert torch.autograd.gradcheck(run, (x, *weights))


class Both(nn.Module):
    """Keys and values of a hook, in one call."""

    def __init__(self, hook: Hypernetwork) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.hook.keys(x), self.hook.values(x)])


# --- how it begins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"layer_norm": True}, {"structure": (1, 2, 2, 1)},
                                     {"activation": "sigmoid", "layer_norm": True, "activate_output": True},
                                     {"activation": "swish", "activate_output": True}])
def test_zero_last_is_the_identity_and_learns(options: dict[str, typing.Any]) -> None:
    hook = made(how="zero_last", spread=0.0, **options)
    x = torch.randn(64, 6, dtype=torch.float64)  # so many that no unit is idle in all, under relu
    assert torch.equal(hook.keys(x), x) and torch.equal(hook.values(x), x)
    last = list(hook.pairs["6"]["k"].parameters())[-2]
    hook.keys(x).square().sum().backward()
    assert last.grad.abs().min() > 0


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "logsigmoid", "hardsigmoid", "relu", "relu6",
                                        "hardshrink", "softshrink", "tanhshrink"])
def test_zero_last_under_an_activation_that_hinders_it(activation: str) -> None:
    with pytest.raises(UserError, match="zero_last cannot begin"):
        made(how="zero_last", activation=activation, activate_output=True)


def test_initial_values_have_the_spread_that_their_names_say() -> None:
    """Glorot & Bengio 2010, equation 16; He et al. 2015, equation 10, with the fan in; A1111's 0.01."""
    wanted = {"normal": 0.01, "xavier_normal": (2 / (200 + 400)) ** 0.5, "xavier_uniform": (2 / (200 + 400)) ** 0.5,
              "kaiming_normal": (2 / 200) ** 0.5, "kaiming_uniform": (2 / 200) ** 0.5}
    for how, std in wanted.items():
        network = nn.Sequential(nn.Linear(200, 400), nn.ReLU(), nn.LayerNorm(400), nn.Linear(400, 200))
        initialise(network, how, torch.Generator().manual_seed(1))
        assert network[0].weight.std().item() == pytest.approx(std, rel=0.02)
        assert network[0].weight.mean().item() == pytest.approx(0, abs=0.02 * std)
        assert network[2].weight.std().item() == pytest.approx(0.01, rel=0.1)  # A1111's gains, and no others
        assert not network[0].bias.any() and not network[2].bias.any()
        again = copy.deepcopy(network)
        initialise(again, how, torch.Generator().manual_seed(1))
        assert all(map(torch.equal, network.parameters(), again.parameters()))


def test_dropout_is_where_a1111_has_it() -> None:
    assert dropout_of([1, 2, 1], 0.3) == (0, 0.3, 0) and dropout_of([1, 2, 1], 0.3, last=False) == (0, 0, 0)
    assert dropout_of([1, 2, 3, 2, 1], 0.3, last=False) == (0, 0.3, 0.3, 0, 0) and dropout_of([1, 1], 0.3) == (0, 0)
    network = Hypernetwork([4], [1, 2, 2, 1], activation="relu", layer_norm=True, dropout=(0, 0.3, 0.1, 0)).pairs
    assert [type(module).__name__ for module in network["4"]["k"]] == [
        "Linear", "ReLU", "LayerNorm", "Dropout", "Linear", "ReLU", "LayerNorm", "Dropout", "Linear", "LayerNorm"]
    assert [module.p for module in network["4"]["k"] if isinstance(module, nn.Dropout)] == [0.3, 0.1]


def test_dropout_is_of_the_hidden_layer_and_of_training_alone() -> None:
    hook = made((50,), dropout=(0, 0.5, 0))
    x = torch.ones(1, 50, dtype=torch.float64)
    assert not torch.equal(hook.keys(x), hook.keys(x))
    hook.eval()
    assert_close(hook.keys(x), reference(hook, 50, "k", x))


@pytest.mark.parametrize("structure", [[], [1], [2, 1], [1, 2], [1, 0, 1], [1, float("nan"), 1], [1, 1e9, 1],
                                       [1, 0.01, 1]])
def test_structures_that_cannot_be(structure: list[float]) -> None:
    with pytest.raises(UserError, match="structure"):
        Hypernetwork([6], structure)


def test_half_precision_contexts_keep_their_type() -> None:
    hook = made().float()
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    out = hook.keys(x)
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), reference(hook.double(), 6, "k", x.double()), rtol=1e-2, atol=1e-2)


# --- on layers ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Keys and values of a context, side by side."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.to_k(x), self.to_v(x)], -1)


LAYERS = [("to_k", "to_v", 6)]
X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def net() -> Attention:
    torch.manual_seed(0)
    return Attention().double().requires_grad_(False)


def wanted(module: Attention, keys: Tensor, values: Tensor) -> Tensor:
    return torch.cat([module.to_k(keys), module.to_v(values)], -1)


def test_hooks_chain_and_come_off_in_any_order() -> None:
    module, plain = net(), net()
    one, two = made(seed=1), made(seed=2, activation="tanh")
    before = module(X)
    first, second = attach_hooks(module, [one], LAYERS), attach_hooks(module, [two], LAYERS, 0.5)
    half = two.scaled(0.5)
    assert_close(module(X), wanted(plain, half.keys(one.keys(X)), half.values(one.values(X))))
    first.enabled = False
    assert_close(module(X), wanted(plain, half.keys(X), half.values(X)))
    first.enabled = True
    second.detach()
    second.detach()
    assert_close(module(X), wanted(plain, one.keys(X), one.values(X)))
    with attach_hooks({"unet": module}, [two], [("unet.to_k", "unet.to_v", 6)]):
        assert_close(module(X), wanted(plain, two.keys(one.keys(X)), two.values(one.values(X))))
    first.detach()
    assert torch.equal(module(X), before)
    assert not any("forward" in part.__dict__ for part in module.modules())


def test_strength_zero_is_the_base_bit_for_bit() -> None:
    module = net()
    before = module(X)
    with attach_hooks(module, [made()], LAYERS, 0.0):
        assert torch.equal(module(X), before)


def test_other_widths_pass() -> None:
    module = net()
    before = module(X)
    attach_hooks(module, [made((7, 8))], LAYERS)
    assert torch.equal(module(X), before)


@pytest.mark.parametrize("hook_first", [True, False])
def test_a_delta_sees_the_hooked_input(hook_first: bool) -> None:
    module, hook, delta = net(), made(), make_delta((4, 6))
    if hook_first:
        hooked, attached = attach_hooks(module, [hook], LAYERS), attach(module, {"to_k": delta})
    else:
        attached, hooked = attach(module, {"to_k": delta}), attach_hooks(module, [hook], LAYERS)
    plain = net()
    plain.to_k.weight += delta.weight()
    want = wanted(plain, hook.keys(X), hook.values(X))
    assert_close(module(X), want)
    assert_close(torch.cat([module.to_k(input=X), module.to_v(input=X)], -1), want)  # by keyword
    attached.merge()
    assert_close(module(X), want)
    hooked.detach()
    assert_close(module(X), wanted(plain, X, X))
    assert not any("forward" in part.__dict__ for part in module.modules())


def test_gradients_reach_a_hook_through_a_frozen_layer() -> None:
    module, hook = net(), made(how="zero_last", spread=0.0)
    attach_hooks(module, [hook], LAYERS)
    module(X).square().sum().backward()
    assert hook.pairs["6"]["k"][1].weight.grad.any() and hook.pairs["6"]["v"][1].weight.grad.any()
    assert module.to_k.weight.grad is None


def test_a_path_that_is_not_there_changes_nothing() -> None:
    module = net()
    with pytest.raises(UserError, match="no such layer"):
        attach_hooks(module, [made()], [*LAYERS, ("to_k", "to_w", 6)])
    assert not any("forward" in part.__dict__ for part in module.modules())
