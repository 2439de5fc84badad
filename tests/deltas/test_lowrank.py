"""LoRA against its definition, finite differences and peft."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.core.rng import generator
from impasto.deltas import DELTAS
from impasto.deltas.layers import shape_of, weight_of
from impasto.deltas.lowrank import LowRank
from tests.deltas.layers import LAYERS, dense_of, make_delta, make_input, make_layer, with_weight

kinds = pytest.mark.parametrize("kind", LAYERS)


def carried(kind: str) -> tuple[nn.Module, Tensor, LowRank]:
    layer = make_layer(kind)
    return layer, make_input(layer), make_delta(shape_of(layer))


def change(layer: nn.Module, x: Tensor, dW: Tensor) -> Tensor:
    """What adding dW to the weight adds to the output."""
    return with_weight(layer, dW)(x) - layer(x)


# --- against the definition ---------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("rslora", [False, True])
def test_weight_is_the_definition(kind: str, rslora: bool) -> None:
    delta = make_delta(shape_of(make_layer(kind)), rslora=rslora)
    assert_close(delta.weight(), dense_of(delta))
    up, down = delta.factors()
    assert_close((up @ down.flatten(1)).view(delta.shape), dense_of(delta))


@kinds
def test_forward_and_add_to_are_a_changed_weight(kind: str) -> None:
    layer, x, delta = carried(kind)
    want = change(layer, x, dense_of(delta))
    assert_close(delta(x, layer), want)
    out = layer(x)
    before = out.clone()
    assert_close(delta.add_to(out, x, layer, out), out + want)
    assert torch.equal(out, before)  # left as it was


@kinds
def test_gradients_are_finite_differences(kind: str) -> None:
    layer, x, delta = carried(kind)
    delta.requires_grad_(True)
    x = x.requires_grad_(True) if x.is_floating_point() else x

    def output(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        factors = {"up": up, "down": down}
        return torch.func.functional_call(Adding(delta), {f"delta.{k}": v for k, v in factors.items()}, (x, layer))

    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        # the padding row has no gradient by torch's convention, so it is no true derivative there
        x = torch.tensor([[1, 3, 8], [0, 0, 7]])
    assert torch.autograd.gradcheck(output, (delta.up, delta.down, x))


class Adding(nn.Module):
    """layer(x) + dW x, with the delta as a submodule, for functional_call."""

    def __init__(self, delta: LowRank) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        return self.delta.add_to(layer(x), x, layer, layer(x))


@kinds
def test_the_dense_route_of_the_base_class_agrees(kind: str) -> None:
    layer, x, delta = carried(kind)
    assert_close(super(LowRank, delta).forward(x, layer), delta(x, layer))
    assert_close(super(LowRank, delta).add_to(layer(x), x, layer, layer(x)), delta.add_to(layer(x), x, layer, layer(x)))


# --- against peft -------------------------------------------------------------------------------------------


def peft_model(model: nn.Sequential, **config: object) -> nn.Module:
    """peft's LoRA on the layers of a Sequential."""
    targets = config.pop("target_modules", [str(i) for i in range(len(model))])
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, **config)).double()


def from_peft(layer: nn.Module, rslora: bool) -> LowRank:
    """Our delta with the factors of peft's layer."""
    if len(layer.lora_embedding_A):
        down, up = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return LowRank.from_factors(up, down, layer.lora_alpha["default"], rslora=rslora)


#: peft's convolutions know neither dilation nor padding modes, and its factors of a grouped one are others
PEFT = [kind for kind in LAYERS if kind not in (
    "conv2d of odd geometry", "conv2d that pads by itself", "conv2d in groups")]


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_peft_computes_the_same(kind: str, rslora: bool) -> None:
    layer, x = make_layer(kind), make_input(make_layer(kind))
    model = peft_model(nn.Sequential(make_layer(kind)), r=4, lora_alpha=6, use_rslora=rslora)
    theirs = model.base_model.model[0]
    ours = from_peft(theirs, rslora).requires_grad_(True)
    out, want = ours.add_to(layer(x), x, layer, layer(x)), model(x)
    assert_close(out, want)
    dW = theirs.get_delta_weight("default")
    assert_close(ours.weight(), dW.T if layer.weight.shape != ours.shape else dW)

    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out)
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    pairs = from_peft_gradients(theirs)
    assert_close(ours.up.grad.flatten(1), pairs[0].flatten(1))
    assert_close(ours.down.grad, pairs[1])


def from_peft_gradients(layer: nn.Module) -> tuple[Tensor, Tensor]:
    if len(layer.lora_embedding_A):
        return layer.lora_embedding_B["default"].grad, layer.lora_embedding_A["default"].grad
    return layer.lora_B["default"].weight.grad, layer.lora_A["default"].weight.grad


def test_initial_values_are_peft_s_in_law() -> None:
    """down uniform in ±1/√fan_in as peft's (compared by range and moments), up zero."""
    for kind in ("linear", "conv2d"):
        layer = make_layer(kind)
        shape = (2000, *shape_of(layer)[1:])
        ours = LowRank(shape, 1500)
        ours.initialise(generator(0, "init"))
        theirs = torch.empty(ours.down.shape)
        nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=generator(1))
        assert not ours.up.any()
        assert_close(ours.down.abs().max(), theirs.abs().max(), rtol=1e-2, atol=0)
        assert_close(ours.down.std(), theirs.std(), rtol=2e-2, atol=0)
        assert abs(ours.down.mean()) < 0.02 * ours.down.abs().max()


# --- numbers ------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_take_fp32_factors(kind: str, dtype: torch.dtype) -> None:
    layer, x, delta = carried(kind)
    want = layer(x) + delta(x, layer)
    half, delta = layer.to(dtype), delta.float().requires_grad_(True)
    y = x.to(dtype) if x.is_floating_point() else x
    out = delta.add_to(half(y), y, half, half(y))
    assert out.dtype == delta(y, half).dtype == dtype
    assert_close(out.double(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    out.sum().backward()
    assert delta.up.grad.dtype == delta.down.grad.dtype == torch.float32


@kinds
def test_autocast_gives_the_layer_s_own_dtype(kind: str) -> None:
    layer, x, delta = carried(kind)
    want = layer(x) + delta(x, layer)
    layer, delta = layer.float(), delta.float().requires_grad_(True)
    y = x.float() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(y)
        out, alone = delta.add_to(plain, y, layer, plain), delta(y, layer)
    assert out.dtype == alone.dtype == plain.dtype
    assert_close(out.double(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    out.float().sum().backward()
    assert delta.down.grad.dtype == torch.float32


def test_products_of_half_precision_factors_are_made_in_fp32() -> None:
    delta = make_delta((40, 30), rank=8, dtype=torch.float16)
    assert delta.weight().dtype == torch.float32
    assert_close(delta.weight().double(), dense_of(delta), rtol=1e-5, atol=1e-5)


def test_a_vector_is_an_input_too() -> None:
    layer, _, delta = carried("linear")
    x = torch.randn(6, dtype=torch.float64)
    assert_close(delta.add_to(layer(x), x, layer, layer(x)), with_weight(layer, dense_of(delta))(x))


# --- dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d in groups"])
def test_dropout_is_of_the_input_and_in_training_only(kind: str) -> None:
    layer, x, given = carried(kind)
    delta = LowRank(given.shape, given.rank, given.alpha, dropout=0.4).double()
    delta.load_state_dict(given.state_dict())
    torch.manual_seed(5)
    out = delta.add_to(layer(x), x, layer, layer(x))
    torch.manual_seed(5)
    assert_close(out, layer(x) + change(layer, nn.functional.dropout(x, 0.4), dense_of(delta)))
    delta.eval()
    assert_close(delta.add_to(layer(x), x, layer, layer(x)), given.add_to(layer(x), x, layer, layer(x)))


def test_dropout_of_a_lookup_leaves_out_whole_rows() -> None:
    layer, x, given = carried("embedding")
    delta = LowRank(given.shape, given.rank, given.alpha, dropout=0.5).double()
    delta.load_state_dict(given.state_dict())
    torch.manual_seed(0)
    ratio = delta(x, layer) / given(x, layer)
    assert ((ratio - 2).abs().lt(1e-9) | ratio.eq(0)).all()
    assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert 0 < ratio[..., 0].count_nonzero() < x.numel()


# --- algebra and parts --------------------------------------------------------------------------------------


@kinds
def test_scaled_and_joined(kind: str) -> None:
    shape = shape_of(make_layer(kind))
    one, two = make_delta(shape, 2, 3.0, 1), make_delta(shape, 5, 0.7, 2, rslora=True)
    assert_close(one.scaled(-0.3).weight(), -0.3 * dense_of(one))
    assert_close(two.scaled(1.7).weight(), 1.7 * dense_of(two))
    both = one.joined(two)
    assert both is not None and both.rank == 7
    assert_close(both.weight(), dense_of(one) + dense_of(two))


@kinds
def test_tensors_say_all(kind: str) -> None:
    delta = make_delta(shape_of(make_layer(kind)), alpha=0.3, rslora=True)
    back = DELTAS.get(delta.kind).from_tensors(delta.tensors())
    assert back.shape == delta.shape
    assert_close(back.weight(), dense_of(delta))


def test_snapshot_is_frozen_and_apart() -> None:
    delta = make_delta((4, 3)).requires_grad_(True)
    copy = delta.snapshot()
    with torch.no_grad():
        delta.up.zero_()
    assert copy.up.any() and not any(p.requires_grad for p in copy.parameters())


def test_weight_is_differentiable() -> None:
    delta = make_delta((4, 3)).requires_grad_(True)
    delta.weight().sum().backward()
    assert delta.up.grad is not None and delta.down.grad is not None


def test_orientation_of_transposed_layers() -> None:
    assert shape_of(make_layer("embedding")) == (5, 9)
    assert shape_of(make_layer("gpt2")) == (5, 6)
    layer = make_layer("gpt2")
    assert weight_of(layer).data_ptr() == layer.weight.data_ptr()  # a view


@pytest.mark.parametrize(("up", "down"), [((4, 2), (3, 5)), ((4, 2, 3, 1), (2, 5, 3, 3)), ((4, 2), (2,)),
                                          ((4, 2, 1), (2, 5))])
def test_factors_that_do_not_fit(up: tuple[int, ...], down: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="do not fit together"):
        LowRank.from_factors(torch.zeros(up), torch.zeros(down))


def test_rank_of_nothing() -> None:
    with pytest.raises(UserError, match="rank is 0"):
        LowRank((4, 3), 0)
