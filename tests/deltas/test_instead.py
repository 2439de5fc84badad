"""(W + dW) · x in one product: the same outputs and gradients as by any other route, and only where it is sound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from impasto.deltas import hadamard, kronecker
from impasto.deltas.attach import attach
from impasto.deltas.delta import Delta
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.layers import apply_weight, weight_of
from impasto.families.lean import lean
from tests.deltas.cases import CASES, definition, make, suits
from tests.deltas.layers import LAYERS, make_input, make_layer, with_weight

PAIRS = [(case, kind) for case in CASES if case.startswith(("loha", "lokr")) for kind in LAYERS
         if suits(case, make_layer(kind)) and not kind.startswith(("embedding", "gpt2"))]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No layer is small enough for the thin factors."""
    for module in (hadamard, kronecker):
        monkeypatch.setattr(module, "by_factors", lambda *_, **__: False)
    yield


class Counting(nn.Conv2d):
    """A layer of a class of somebody's own."""


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("leaned", [False, True], ids=["plain", "lean"])
@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_output_and_gradients_are_those_of_the_summed_weight(case: str, kind: str, leaned: bool) -> None:
    net = nn.ModuleDict({"layer": make_layer(kind)})
    if leaned:
        lean(net)
    layer, x = net["layer"], make_input(net["layer"]).requires_grad_()
    delta = make(case, layer).requires_grad_(True)
    want = with_weight(make_layer(kind), definition(delta, weight_of(layer)).detach())(x)
    with attach(net, {"layer": delta}):
        assert delta.instead(x, layer) is not None
        out = layer(x)
    assert_close(out, want)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    names = [name for name, _ in delta.named_parameters()]
    got = torch.autograd.grad(out, [x, *delta.parameters()], g)
    dense = apply_weight(x, weight_of(layer) + delta.weight(), make_layer(kind))
    reference = torch.autograd.grad(dense, [x, *delta.parameters()], g)
    for name, one, other in zip(["x", *names], got, reference, strict=True):
        assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", ["loha", "lokr"])
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind.startswith("conv")])
def test_one_picture_is_as_good_as_a_batch(case: str, kind: str) -> None:
    """A convolution takes (C, H, W) too."""
    layer = make_layer(kind)
    delta, x = make(case, layer).requires_grad_(True), make_input(layer)[0].requires_grad_()
    want = with_weight(make_layer(kind), definition(delta, weight_of(layer)).detach())(x)
    with attach(nn.ModuleDict({"layer": layer}), {"layer": delta}):
        out = layer(x)
    assert_close(out, want)
    got = torch.autograd.grad(out.square().sum(), [x, *delta.parameters()])
    dense = apply_weight(x, weight_of(layer) + delta.weight(), make_layer(kind))
    if layer.bias is not None:
        dense = dense + layer.bias.view(-1, *(1 for _ in layer.kernel_size))
    for one, other in zip(got, torch.autograd.grad(dense.square().sum(), [x, *delta.parameters()]), strict=True):
        assert_close(one, other)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_an_input_that_needs_no_gradient_gets_none(case: str) -> None:
    layer = make_layer("linear")
    delta = make(case, layer).requires_grad_(True)
    out = delta.instead(make_input(layer), layer)
    assert out is not None
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters()) and layer.weight.grad is None


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_sums_only_where_nothing_is_lost(case: str) -> None:
    layer = make_layer("conv2d")
    x, delta = make_input(layer), make(case, layer)
    assert delta.instead(x, layer) is not None
    assert delta.instead(x.float(), layer) is None  # the layer itself says what is wrong
    assert delta.instead(x.bfloat16(), layer.bfloat16()) is None  # a small change would be rounded away
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert delta.float().instead(x, layer) is None
    assert layer.bias is not None
    layer.bias.requires_grad_()
    assert delta.instead(x, layer) is None  # somebody trains it
    assert make(case, make_layer("gpt2")).instead(make_input(make_layer("gpt2")), make_layer("gpt2")) is None
    own = Counting(4, 6, 3, stride=2, padding=1).requires_grad_(False)
    assert delta.instead(x, own) is None


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_a_layer_that_carries_more_keeps_its_own_product(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("linear")
    net, x = nn.ModuleDict({"layer": layer}), make_input(layer)
    one, two = make(case, layer), make("lora", layer, seed=3)
    both = with_weight(make_layer("linear"), definition(one, weight_of(layer)) + definition(two, weight_of(layer)))(x)
    asked = list[Delta]()
    summed = type(one).instead
    monkeypatch.setattr(type(one), "instead", lambda self, x, layer: asked.append(self) or summed(self, x, layer))
    with attach(net, {"layer": one}), attach(net, {"layer": two}) as above:
        assert_close(layer(x), both)
        assert not asked
        above.enabled = False
        layer(x)
        assert asked == [one]
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)  # somebody else's
    with attach(net, {"layer": one}):
        want = 2 * plain(x) + one(x, layer)
        assert_close(layer(x), want)
    assert asked == [one]


SHAPE = (320, 320)


@pytest.mark.parametrize(("delta", "tokens", "taken"), [
    (Hadamard(SHAPE, 8), 1024, True), (Hadamard(SHAPE, 8), 64, False), (Kronecker(SHAPE, 8), 64, False),
    (Kronecker(SHAPE, 8, factor=6, full=True), 1024, True)])
def test_a_small_layer_of_many_tokens_is_summed(delta: Delta, tokens: int, taken: bool) -> None:
    layer = nn.Linear(*SHAPE).requires_grad_(False)
    assert (delta.instead(torch.zeros(1, tokens, SHAPE[1]), layer) is not None) == taken
