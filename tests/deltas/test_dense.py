"""Changes of whole weights, of biases and of norms, against layers whose own tensors are changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach
from impasto.deltas.dense import Dense
from impasto.deltas.lowrank import LowRank

#: a layer, and an input for it; each has a bias
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5, 4)),
    "group norm of vectors": (lambda: nn.GroupNorm(3, 6), (2, 6)),
    "layer norm": (lambda: nn.LayerNorm(6, eps=1e-3), (2, 3, 6)),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def carried(kind: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A layer of random weights, an input, and changes of its weight and bias."""
    torch.manual_seed(0)
    layer, size = LAYERS[kind][0]().double().requires_grad_(False), LAYERS[kind][1]
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(size, dtype=torch.float64)
    return layer, x, torch.randn_like(layer.weight), torch.randn_like(layer.bias)  # pyright: ignore


def changed(layer: nn.Module, weight: Tensor | float, bias: Tensor | float) -> nn.Module:
    other = copy.deepcopy(layer)
    other.weight += weight  # pyright: ignore
    other.bias += bias  # pyright: ignore
    return other


@layers
def test_weight_and_bias_change_together_and_alone(kind: str) -> None:
    layer, x, dW, db = carried(kind)
    for delta, want in ((Dense.from_weight(dW, db), changed(layer, dW, db)),
                        (Dense.from_weight(dW), changed(layer, dW, 0)),
                        (Dense.from_weight(None, db), changed(layer, 0, db)),
                        (Dense.from_weight(dW, db).scaled(0.5).scaled(-3.0), changed(layer, -1.5 * dW, -1.5 * db))):
        plain = layer(x)
        before = plain.clone()
        assert_close(delta.add_to(plain, x, layer, plain), want(x))
        assert torch.equal(plain, before)
        again = Dense.from_tensors(delta.tensors())
        assert again.shape == delta.shape
        assert_close(again.add_to(2 * plain, x, layer, plain), want(x) + plain)  # on top of another


@layers
def test_attached_at_a_strength_and_merged(kind: str) -> None:
    layer, x, dW, db = carried(kind)
    net, want = nn.ModuleDict({"layer": layer}), changed(layer, 0.7 * dW, 0.7 * db)(x)
    adapter = Adapter({"layer": (Dense.from_weight(dW, db),)})
    with attach(net, adapter * 0.7):
        assert_close(layer(x), want)
    attach(net, adapter, strength=0.7).merge()
    assert_close(layer(x), want)


@layers
def test_gradients_are_those_of_the_layer_s_own_tensors(kind: str) -> None:
    layer, x, dW, db = carried(kind)
    delta, want = Dense.from_weight(dW, db).requires_grad_(True), changed(layer, dW, db).requires_grad_(True)
    got = []
    for parameters, output in ((list(delta.parameters()), lambda y: delta.add_to(layer(y), y, layer, layer(y))),
                               ([want.weight, want.bias], want)):
        y = x.clone().requires_grad_()
        out = output(y)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        got.append(torch.autograd.grad(out, [y, *parameters], g))
    for one, other in zip(*got, strict=True):
        assert_close(one, other)


@layers
def test_half_precision_layers_take_fp32_changes(kind: str) -> None:
    layer, x, dW, db = carried(kind)
    want = changed(layer, dW, db)(x)
    half, delta = layer.bfloat16(), Dense.from_weight(dW.float(), db.float())
    y = x.bfloat16()
    out = delta.add_to(half(y), y, half, half(y))
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("one", ["weight", "bias", "both"])
@pytest.mark.parametrize("other", ["weight", "bias", "both"])
def test_sums_are_of_what_is_there(one: str, other: str) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [{"weight": torch.randn(4, 6, generator=draw, dtype=torch.float64) if which != "bias" else None,
              "bias": torch.randn(4, generator=draw, dtype=torch.float64) if which != "weight" else None}
             for which in (one, other)]
    total = Dense.from_weight(**parts[0]).scaled(2.0).joined(Dense.from_weight(**parts[1]))
    assert total is not None
    found = total.tensors()
    assert set(found) == {name for part in parts for name, tensor in part.items() if tensor is not None}
    for name, tensor in found.items():
        first, second = (part[name] if part[name] is not None else torch.zeros(()) for part in parts)
        assert_close(tensor, (2 * first + second).double())
    (term,) = (Adapter({"layer": (Dense.from_weight(**parts[0]),)}) * 2
               + Adapter({"layer": (Dense.from_weight(**parts[1]),)})).deltas["layer"]
    assert isinstance(term, Dense)


def test_a_sum_of_halves_is_in_fp32_and_one_with_other_kinds_stands_beside_them() -> None:
    half = Dense.from_weight(torch.full((2, 2), 2.0**-12).half())
    total = half.joined(Dense.from_weight(torch.ones(2, 2).half()))
    assert total is not None and total.weight().dtype == torch.float32
    assert torch.equal(total.weight(), torch.full((2, 2), 1 + 2.0**-12))  # which fp16 cannot tell from one
    assert half.joined(LowRank((2, 2), 1)) is None
    both = Adapter({"layer": (half,)}) + Adapter({"layer": (LowRank((2, 2), 1),)})
    assert len(both.deltas["layer"]) == 2


def test_a_change_of_the_bias_alone_says_nothing_of_the_weight() -> None:
    delta = Dense.from_weight(None, torch.ones(4))
    assert delta.shape == () and set(delta.tensors()) == {"bias"}
    W = torch.randn(4, 6, dtype=torch.bfloat16)
    assert torch.equal(delta.weight(W), torch.zeros(4, 6))
    assert torch.equal(delta.weight() + W, W.float())  # a zero that adds up with any shape


@pytest.mark.parametrize(("layer", "delta", "said"), [
    (nn.GroupNorm(2, 6), Dense.from_weight(torch.ones(4)), r"layer: the layer's weight is \(6,\).*change is \(4,\)"),
    (nn.LayerNorm(6), Dense.from_weight(None, torch.ones(4)), r"layer: .*\(6,\).*change is \(4,\).*another base"),
    (nn.LayerNorm(6), Dense.from_weight(torch.ones(6, 6)), r"layer: .*\(6,\).*change is \(6, 6\)"),
    (nn.LayerNorm(6, elementwise_affine=False), Dense.from_weight(torch.ones(6)), "layer: is a LayerNorm, which"),
    (nn.Linear(6, 4), Dense.from_weight(torch.ones(4, 6), torch.ones(4)).scaled(2), None),
    (nn.Linear(6, 4), Dense.from_weight(None, torch.ones(6)), r"layer: .*\(4,\).*change is \(6,\)"),
    (nn.Conv2d(6, 4, 3), Dense.from_weight(torch.ones(4, 6)), r"layer: .*\(4, 6, 3, 3\).*change is \(4, 6\)"),
    (nn.Embedding(6, 4), Dense.from_weight(None, torch.ones(4)), "layer: is an embedding, which has no bias"),
    (nn.BatchNorm1d(6), Dense.from_weight(torch.ones(6)), "layer: is a BatchNorm1d, which cannot carry a delta"),
])
def test_what_fits_no_layer_is_refused(layer: nn.Module, delta: Dense, said: str | None) -> None:
    if said is None:
        delta.check_fit(layer, "layer")
        return
    with pytest.raises(UserError, match=said):
        attach(nn.ModuleDict({"layer": layer}), {"layer": delta})


def test_a_layer_without_a_bias_gets_one_in_its_outputs() -> None:
    torch.manual_seed(0)
    layer, x, db = nn.Linear(6, 4, bias=False), torch.randn(2, 6), torch.randn(4)
    plain = layer(x)
    with attach(nn.ModuleDict({"layer": layer}), {"layer": Dense.from_weight(None, db)}):
        assert_close(layer(x), plain + db)
    attachment = attach(nn.ModuleDict({"layer": layer}), {"layer": Dense.from_weight(None, db)})
    with pytest.raises(UserError, match="layer: has no bias that a change of it could be merged into; keep"):
        attachment.merge()
