"""Every kind beside LyCORIS' and peft's own modules: outputs, and the gradients of each factor and of the input."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.hadamard import Hadamard, by_factors
from impasto.deltas.kronecker import Kronecker, factorization
from impasto.deltas.layers import shape_of, weight_of
from impasto.deltas.lowrank import LowRank
from tests.deltas.cases import CASES, definition, make
from tests.deltas.layers import make_input, make_layer

pytest.importorskip("lycoris", reason="lycoris-lora is not installed", exc_type=ImportError)

from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

#: sides that split into 4 · 6, 5 · 6, 4 · 4
BUILT: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(30, 24),
    "conv2d": lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1),
    "conv2d 1x1": lambda: nn.Conv2d(16, 24, 1),
    "conv2d in groups": lambda: nn.Conv2d(32, 24, (3, 2), groups=2, dilation=2, bias=False),
    "conv1d": lambda: nn.Conv1d(16, 24, 3, padding=2),
}
SIDES = {3: (7,), 4: (7, 6)}

#: rank; alpha is three quarters of twice that, so that no scale is 1 and each is exact in any float
PLAIN: dict[str, tuple[int, dict[str, Any]]] = {"thin": (2, {}), "thick": (6, {})}
TUCKER: dict[str, tuple[int, dict[str, Any]]] = {"tucker": (2, {"tucker": True})}
SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "low rank": (2, {}), "whole at this rank": (3, {}), "full": (2, {"full": True}),
    "both": (1, {"decompose_both": True}), "both, of which one is whole": (2, {"decompose_both": True, "factor": 2}),
    "factor 2": (5, {"factor": 2}), "factor that does not divide": (2, {"factor": 5}),
    "factor above the root": (1, {"factor": 12}), "full of a factor": (9, {"factor": 2, "full": True}),
}
KINDS: dict[str, tuple[type[Any], type[Any], dict[str, tuple[int, dict[str, Any]]]]] = {
    "loha": (Hadamard, LohaModule, PLAIN | TUCKER),
    "lokr": (Kronecker, LokrModule, SPLITS | {"tucker": (1, {"tucker": True}), "tucker of a factor": (
        2, {"tucker": True, "factor": 2}), "whole in spite of tucker": (8, {"tucker": True})}),
    "lora": (LowRank, LoConModule, PLAIN | TUCKER),
}
ALL = [(kind, how, layer) for kind, (_, _, ways) in KINDS.items() for how in ways for layer in BUILT
       if "tucker" not in how or "1x1" not in layer and layer != "linear"]
#: names of options and of factors in LyCORIS
OPTIONS = {"tucker": "use_tucker", "full": "full_matrix"}
LORA = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def built(layer: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    module = BUILT[layer]().double().requires_grad_(False)
    sizes = (3, 30) if isinstance(module, nn.Linear) else (int(module.in_channels), *SIDES[weight_of(module).ndim])
    return module, torch.randn(2, *sizes, dtype=torch.float64)


def drawn(module: nn.Module) -> Any:
    """In float64, every parameter random, magnitudes positive."""
    module.double()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(values.abs() + 0.5 if "dora" in name or "magnitude" in name else values)
    return module


def theirs_of(kind: str, how: str, layer: nn.Module, **options: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """LyCORIS' module, and its factors by our names."""
    _, module, ways = KINDS[kind]
    rank, ours = ways[how]
    made = drawn(module("layer", layer, lora_dim=rank, alpha=1.5 * rank, **options,
                        **{OPTIONS.get(key, key): value for key, value in ours.items()}))
    held = dict(made.named_parameters())
    prefix = {"loha": "hada_", "lokr": "lokr_"}.get(kind)
    names = {ours: full for ours, full in LORA.items() if full in held} if prefix is None else {
        full.removeprefix(prefix): full for full in held if full.startswith(prefix)}
    return made, {ours: held[full] for ours, full in names.items()}


def ours_of(kind: str, how: str, layer: nn.Module, held: dict[str, nn.Parameter]) -> Any:
    """Ours with their factors: its own constructor's, which therefore must have the same sizes."""
    delta_type, _, ways = KINDS[kind]
    rank, options = ways[how]
    delta = delta_type(shape_of(layer), rank, 1.5 * rank, **options).double()
    factors = dict(delta.named_parameters())
    assert {name: factor.shape for name, factor in factors.items()} == {n: factor.shape for n, factor in held.items()}
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(held[name])
    return delta


def gradients(output: Callable[[Tensor], Tensor], x: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The output, and the gradients of x and of the parameters for a random one of the output."""
    x = x.clone().requires_grad_(x.is_floating_point())
    out = output(x)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = {**({"x": x} if x.requires_grad else {}), **parameters}
    return {"out": out.detach(), **dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), g), strict=True))}


def adding(delta: Delta, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def output(x: Tensor) -> Tensor:
        plain = layer(x)
        return delta.add_to(plain, x, layer, plain)
    return output


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.abs().max() > 0, name
        assert_close(got[name], value.reshape(got[name].shape), rtol=1e-10, atol=1e-10 * float(value.abs().max()),
                     msg=lambda text, name=name: f"{name}: {text}")


# --- LyCORIS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how", "layer"), ALL)
def test_lycoris(kind: str, how: str, layer: str) -> None:
    module, x = built(layer)
    theirs, held = theirs_of(kind, how, module)
    ours = ours_of(kind, how, module, held)
    assert_same(gradients(adding(ours, module), x, dict(ours.named_parameters())), gradients(theirs, x, held))
    if kind != "lora":  # what its get_diff_weight multiplies by alpha / rank once more
        assert_close(ours.weight(), theirs.get_weight(shape_of(module)), rtol=1e-10, atol=1e-10)
    assert_close(ours(x, module), theirs(x) - module(x), rtol=1e-9, atol=1e-9)


def test_both_routes_of_a_loha_are_among_them() -> None:
    shape, tokens = shape_of(built("linear")[0]), 6
    assert by_factors(2, tokens, shape) and not by_factors(6, tokens, shape)


@pytest.mark.parametrize("how", ["whole at this rank", "full", "full of a factor"])
def test_alpha_has_no_meaning_where_both_matrices_are_whole(how: str) -> None:
    module, _ = built("linear")
    theirs, held = theirs_of("lokr", how, module)
    assert theirs.scale == ours_of("lokr", how, module, held).scale == 1 and set(held) == {"w1", "w2"}


@pytest.mark.parametrize("layer", BUILT)
def test_lycoris_full(layer: str) -> None:
    module, x = built(layer)
    theirs = drawn(FullModule("layer", module))
    ours = Dense(shape_of(module), bias=module.bias is not None).double()
    held = {"change": theirs.weight, "change_of_bias": theirs.bias}
    held = {name: change for name, change in held.items() if change is not None}
    with torch.no_grad():
        for name, change in ours.named_parameters():
            change.copy_(held[name])
    assert_same(gradients(adding(ours, module), x, dict(ours.named_parameters())), gradients(theirs, x, held))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.LayerNorm(6)], ids=["group", "layer"])
def test_lycoris_norms(norm: nn.Module) -> None:
    norm = drawn(norm).requires_grad_(False)
    x = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = drawn(NormModule("norm", norm))
    ours = Dense((6,), bias=True).double()
    held = {"change": theirs.w_norm, "change_of_bias": theirs.b_norm}
    with torch.no_grad():
        for name, change in ours.named_parameters():
            change.copy_(held[name])
    assert_same(gradients(adding(ours, norm), x, dict(ours.named_parameters())), gradients(theirs, x, held))


@pytest.mark.parametrize("factor", [-1, *range(1, 40), 64, 100, 320, 1280, 5000])
def test_sides_are_split_as_lycoris_splits_them(factor: int) -> None:
    sizes = [*range(1, 400), 512, 640, 768, 960, 1024, 1280, 1920, 2048, 2560, 3072, 5120, 10240, 49408]
    split = {size: factorization(size, factor) for size in sizes}
    assert split == {size: lycoris_factorization(size, factor) for size in sizes}
    assert all(m * n == size and m <= n for size, (m, n) in split.items())


# --- peft ---------------------------------------------------------------------------------------------------


def wrapped(module: nn.Module, config: Any) -> Any:
    """peft's layer around a module."""
    return drawn(get_peft_model(nn.ModuleDict({"layer": module}), config)).base_model.model["layer"]


def factors_of(layer: Any, prefix: str) -> dict[str, nn.Parameter]:
    """By our names."""
    return {name.removeprefix(prefix): getattr(layer, name)["default"] for name in layer.adapter_layer_names
            if name.startswith(prefix) and "default" in getattr(layer, name)}


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d 1x1", "conv2d in groups"])
def test_peft_loha(layer: str, effective: bool) -> None:
    module, x = built(layer)
    theirs = wrapped(module, LoHaConfig(r=2, alpha=3, target_modules=["layer"], use_effective_conv2d=effective))
    held = factors_of(theirs, "hada_")
    assert ("t1" in held) == (effective and layer in ("conv2d", "conv2d in groups"))
    ours = Hadamard.from_factors(shape_of(module), **held, alpha=3.0).requires_grad_(True)
    # with cores, 0.21 takes the other half's chain for the gradients of w1_a and w2_a: no derivatives of its own dW
    right = {name: factor for name, factor in held.items() if "t1" not in held or not name.endswith("_a")}
    assert_same(gradients(adding(ours, module), x, {name: getattr(ours, name) for name in right}),
                gradients(theirs, x, right))
    assert_close(ours.weight(), theirs.get_delta_weight("default"))


@pytest.mark.parametrize(("rank", "options"), [
    (2, {}), (2, {"use_effective_conv2d": True}), (1, {"decompose_both": True}), (2, {"decompose_factor": 2}),
    (4, {"decompose_factor": 12}), (8, {}),
])
@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d 1x1", "conv2d in groups"])
def test_peft_lokr(layer: str, rank: int, options: dict[str, Any]) -> None:
    module, x = built(layer)
    theirs = wrapped(module, LoKrConfig(r=rank, alpha=2 * rank, target_modules=["layer"], **options))
    held = factors_of(theirs, "lokr_")
    ours = Kronecker.from_factors(shape_of(module), **held, alpha=2.0 * rank)
    if not ours.rank:  # peft's alpha has a meaning there, too
        ours = ours.scaled(2.0)
    ours.requires_grad_(True)
    assert_same(gradients(adding(ours, module), x, {name: getattr(ours, name) for name in held}),
                gradients(theirs, x, held))
    assert_close(ours.weight(), theirs.get_delta_weight("default"))


# --- DoRA ---------------------------------------------------------------------------------------------------


def dora_of(inner: Delta, magnitude: Tensor, shape: tuple[int, ...] | None = None) -> Dora:
    return Dora(inner, magnitude.detach().reshape(shape or magnitude.shape)).requires_grad_(True)


@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d 1x1", "conv1d", "embedding"])
def test_peft_dora(layer: str) -> None:
    """The norm a constant in the backward pass, as there."""
    if layer == "embedding":
        module = make_layer(layer)
        x = make_input(module)
    else:
        module, x = built(layer)
    theirs = wrapped(module, LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], use_dora=True))
    if layer == "embedding":
        up, down = theirs.lora_embedding_B["default"], theirs.lora_embedding_A["default"]
    else:
        up, down = theirs.lora_B["default"].weight, theirs.lora_A["default"].weight
    magnitude = theirs.lora_magnitude_vector["default"].weight
    shape = shape_of(module)
    ours = dora_of(LowRank.from_factors(up, down, 3.0), magnitude, (shape[0], *(1 for _ in shape[1:])))
    assert isinstance(ours.inner, LowRank)
    assert_same(
        gradients(adding(ours, module), x, {"up": ours.inner.up, "down": ours.inner.down, "m": ours.magnitude}),
        gradients(theirs, x, {"up": up, "down": down, "m": magnitude}))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("kind", "how", "layer"), [
    (kind, how, layer) for kind, how, layer in ALL if layer in ("linear", "conv2d", "conv2d in groups")
    and how in ("thin", "low rank", "full", "tucker")])
def test_lycoris_dora(kind: str, how: str, layer: str, axis: str) -> None:
    """Outputs, gradients of x and of the magnitude; those of the factors go through the norm there."""
    module, x = built(layer)
    theirs, held = theirs_of(kind, how, module, weight_decompose=True, wd_on_out=axis == "out")
    ours = dora_of(ours_of(kind, how, module, held), theirs.dora_scale)
    assert ours.by_output == (axis == "out")
    assert_same(gradients(adding(ours, module), x, {"m": ours.magnitude}),
                gradients(theirs, x, {"m": theirs.dora_scale}))


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_magnitude_begins_as_lycoris_has_it(axis: Any, layer: str) -> None:
    module, _ = built(layer)
    theirs = LoConModule("layer", module, lora_dim=2, weight_decompose=True, wd_on_out=axis == "out")
    ours = Dora.of(LowRank(shape_of(module), 2), weight_of(module), axis)
    assert_close(ours.magnitude, theirs.dora_scale.detach(), rtol=1e-6, atol=0, check_dtype=False)
    assert ours.magnitude.shape == theirs.dora_scale.shape


@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d in groups", "conv1d", "gpt2", "embedding"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dora")])
def test_gradients_of_dora_are_those_with_the_norm_a_constant(case: str, layer: str) -> None:
    """Equation 5 with section 4.3's constant, written out with a dense dW; the whole derivative is another."""
    module = make_layer(layer)
    x, delta = make_input(module), make(case, module).requires_grad_(True)
    assert isinstance(delta, Dora)
    parameters, W = dict(delta.named_parameters()), weight_of(module)
    along = [axis for axis in range(W.ndim) if axis != (1 if "input" in case else 0)]

    def changed(norm_is_constant: bool) -> Callable[[Tensor], Tensor]:
        def output(x: Tensor) -> Tensor:
            turned = W + definition(delta.inner, W)
            norm = turned.square().sum(along, keepdim=True).sqrt()
            weight = delta.magnitude * turned / (norm.detach() if norm_is_constant else norm)
            transposed = layer in ("gpt2", "embedding")
            return torch.func.functional_call(module, {"weight": weight.T if transposed else weight}, (x,))
        return output

    got = gradients(adding(delta, module), x, parameters)
    assert_same(got, gradients(changed(True), x, parameters))
    whole = gradients(changed(False), x, parameters)
    assert_close(whole["out"], got["out"])
    assert all((whole[name] - got[name]).abs().max() > 1e-3 for name in parameters if name != "magnitude")
