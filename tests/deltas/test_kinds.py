"""What every kind of delta must do, over the registry: one list of cases, every layer that can carry them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas import DELTAS
from impasto.deltas.attach import attach
from impasto.deltas.delta import Delta
from impasto.deltas.layers import apply_weight, shape_of, weight_of
from tests.deltas.cases import CASES, definition, make, suits
from tests.deltas.layers import LAYERS, make_input, make_layer, with_weight

PAIRS = [(case, kind) for case in CASES for kind in LAYERS if suits(case, make_layer(kind))]
pairs = pytest.mark.parametrize(("case", "kind"), PAIRS)
#: a layer with a kernel, one without
FEW = [(case, kind) for case in CASES for kind in ("linear", "conv2d") if suits(case, make_layer(kind))]
few = pytest.mark.parametrize(("case", "kind"), FEW)


def carried(case: str, kind: str) -> tuple[nn.Module, Tensor, Delta]:
    layer = make_layer(kind)
    return layer, make_input(layer), make(case, layer)


def test_every_kind_has_a_case() -> None:
    assert {make(case, make_layer("conv2d")).kind for case in CASES} == set(DELTAS)
    assert all(DELTAS.get(kind).kind == kind for kind in DELTAS)


@pairs
def test_weight_and_forward_are_the_definition(case: str, kind: str) -> None:
    layer, x, delta = carried(case, kind)
    want = definition(delta, weight_of(layer))
    assert_close(delta.weight(weight_of(layer)), want)
    out, change = layer(x), with_weight(layer, want)(x) - layer(x)
    before = out.clone()
    assert_close(delta(x, layer), change)
    assert_close(delta.add_to(out, x, layer, out), out + change)
    assert torch.equal(out, before)
    assert_close(delta.add_to(2 * out, x, layer, out), 2 * out + change)  # on top of another delta


@pairs
def test_inputs_may_have_no_batch_or_an_empty_one_and_any_strides(case: str, kind: str) -> None:
    layer, x, delta = carried(case, kind)
    delta.requires_grad_(True)
    changed = with_weight(layer, definition(delta, weight_of(layer)).detach())
    inputs = [x[0], x[:0]]
    if kind != "gpt2":  # which itself views its input
        inputs.append(x.transpose(0, 1).contiguous().transpose(0, 1))
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        inputs.append(x[0, 0])
    if isinstance(layer, nn.Conv2d):
        inputs.append(x.to(memory_format=torch.channels_last))
    for y in inputs:
        out = layer(y)
        total = delta.add_to(out, y, layer, out)
        assert_close(total, changed(y))
        assert_close(delta(y, layer), changed(y) - out)
        total.sum().backward()


@pairs
def test_strengths_tensors_and_snapshots_say_the_same(case: str, kind: str) -> None:
    layer, x, delta = carried(case, kind)
    W = weight_of(layer)
    want = definition(delta, W)
    half = delta.scaled(0.5)
    assert_close(half.weight(W), 0.5 * want)
    assert_close(half.scaled(-3.0).weight(W), -1.5 * want)
    assert_close(half(x, layer), 0.5 * delta(x, layer))
    for one, dW in ((delta, want), (half, 0.5 * want)):
        again = type(one).from_tensors(one.tensors())
        assert again.shape == delta.shape and not any(p.requires_grad for p in again.parameters())
        assert_close(again.weight(W), dW)
    snapshot = delta.requires_grad_(True).snapshot()
    assert not any(p.requires_grad for p in snapshot.parameters())
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.zero_()
    assert_close(snapshot.weight(W), want)
    assert_close(half.weight(W), delta.scaled(0.5).weight(W), equal_nan=True)  # shares its factors


@pairs
def test_factors_where_there_are_any_multiply_to_the_weight(case: str, kind: str) -> None:
    layer, _, delta = carried(case, kind)
    if (factors := delta.factors()) is None:
        assert case.split(",")[0] in ("lokr", "dense") or case.startswith("dora")
        return
    up, down = factors
    assert up.ndim == 2 and down.shape[1:] == delta.shape[1:]
    assert_close((up @ down.flatten(1)).view(delta.shape), definition(delta, weight_of(layer)))


@pytest.mark.parametrize(("case", "kind"), [pair for pair in FEW if not pair[0].startswith("dora")])
def test_gradients_are_finite_differences(case: str, kind: str) -> None:
    layer, x, delta = carried(case, kind)
    names = [name for name, _ in delta.named_parameters()]

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(Adding(delta), dict(zip((f"delta.{n}" for n in names), values, strict=True)),
                                          (x, layer))

    values = [p.detach().clone().requires_grad_() for p in delta.parameters()]
    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *values))


class Adding(nn.Module):
    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        out = layer(x)
        return self.delta.add_to(out, x, layer, out)


@pairs
def test_gradients_are_those_of_the_dense_weight(case: str, kind: str) -> None:
    layer, x, delta = carried(case, kind)
    if kind == "embedding with padding":  # that row has no gradient by torch's convention
        x = torch.tensor([[1, 3, 8], [0, 0, 7]])
    delta.requires_grad_(True)
    out = layer(x)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    delta.add_to(out, x, layer, out).backward(g)
    got = {name: p.grad for name, p in delta.named_parameters()}
    delta.zero_grad()
    weight = delta.weight(weight_of(layer))
    dense = apply_weight(x, weight, layer)
    dense.backward(g)
    for name, p in delta.named_parameters():
        assert_close(got[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@few
def test_half_precision_layers_take_fp32_factors(case: str, kind: str, dtype: torch.dtype) -> None:
    layer, x, delta = carried(case, kind)
    want = layer(x) + delta(x, layer)
    half, delta, y = layer.to(dtype), delta.float().requires_grad_(True), x.to(dtype)
    out = delta.add_to(half(y), y, half, half(y))
    assert out.dtype == delta(y, half).dtype == dtype
    assert_close(out.double(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())


@few
def test_autocast_gives_the_layer_s_own_dtype(case: str, kind: str) -> None:
    layer, x, delta = carried(case, kind)
    layer, delta, y = layer.float(), delta.float().requires_grad_(True), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(y)
        out, alone = delta.add_to(plain, y, layer, plain), delta(y, layer)
    assert out.dtype == alone.dtype == plain.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is not None for p in delta.parameters())


@few
def test_a_step_is_traced_without_numbers(case: str, kind: str) -> None:
    with FakeTensorMode():
        layer = LAYERS[kind]()
        delta = CASES[case](layer).requires_grad_(True)
        x = torch.randn(2, 3, 6) if kind == "linear" else torch.randn(2, 4, 5, 4)
        out = layer(x)
        delta.add_to(out, x, layer, out).square().sum().backward()
        assert all(p.grad is not None for p in delta.parameters())


@pairs
def test_attached_stacked_taken_off_and_merged(case: str, kind: str) -> None:
    layer, x, delta = carried(case, kind)
    net, plain = nn.ModuleDict({"layer": layer}), layer(x)
    other = make("lora", layer, seed=9)
    below = attach(net, {"layer": other})
    alone = definition(delta, weight_of(layer))
    with attach(net, {"layer": delta}, strength=0.7):
        both = with_weight(copy.deepcopy(make_layer(kind)), 0.7 * alone + definition(other, weight_of(layer)))
        assert_close(layer(x), both(x))
    below.detach()
    assert torch.equal(layer(x), plain)
    changed = with_weight(make_layer(kind), alone)(x)
    attach(net, {"layer": delta}).merge()
    assert_close(layer(x), changed)


@few
def test_a_change_of_another_shape_is_refused(case: str, kind: str) -> None:
    layer, _, delta = carried(case, kind)
    with pytest.raises(UserError, match=r"layer: .*the adapter's change is"):
        attach(nn.ModuleDict({"layer": nn.Linear(7, 7)}), {"layer": delta})
    norm = nn.GroupNorm(1, shape_of(layer)[0])
    with pytest.raises(UserError, match="cannot carry a delta"):
        attach(nn.ModuleDict({"layer": norm if case != "dense" else nn.ReLU()}), {"layer": delta})
