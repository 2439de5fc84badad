"""Where deltas begin, what rank they can have, and factors that make no delta."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.core.rng import generator
from impasto.deltas.attach import attach
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.layers import weight_of
from impasto.deltas.lowrank import LowRank
from tests.deltas.cases import CASES, rank_of, suits
from tests.deltas.layers import LAYERS, make_input, make_layer

# --- ranks --------------------------------------------------------------------------------------------------


def random(delta: Delta, seed: int = 0) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in delta.double().parameters():
            factor.copy_(torch.randn(factor.shape, generator=draw, dtype=torch.float64))
    return delta


@pytest.mark.parametrize("shape", [(40, 30), (40, 10, 3, 3)], ids=["linear", "conv2d"])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_a_loha_of_rank_r_has_rank_r_squared(rank: int, tucker: bool, shape: tuple[int, ...]) -> None:
    """At most, by the paper's proposition 1; at random, exactly. A LoRA of as many parameters has 2r."""
    if tucker and len(shape) == 2:
        with pytest.raises(UserError, match="no kernel for a Tucker core"):
            Hadamard(shape, rank, tucker=True)
        return
    loha, lora = Hadamard(shape, rank, 1.0, tucker=tucker), LowRank(shape, 2 * rank, 1.0)
    assert rank_of(random(loha).weight()) == rank**2
    assert rank_of(random(lora).weight()) == 2 * rank
    if not tucker:
        assert sum(p.numel() for p in loha.parameters()) == sum(p.numel() for p in lora.parameters())


@pytest.mark.parametrize(("options", "rank"), [
    ({}, 5 * 2), ({"factor": 2}, 2 * 2), ({"decompose_both": True}, 2 * 2), ({"full": True}, 5 * 6),
])
def test_a_lokr_has_the_product_of_its_matrices_ranks(options: dict[str, Any], rank: int) -> None:
    """30 = 5 · 6 and 40 = 5 · 8, or 2 · 15 and 2 · 20."""
    assert rank_of(random(Kronecker((40, 30), 2, 1.0, **options)).weight()) == rank


# --- initial values -----------------------------------------------------------------------------------------


def begun(case: str, layer: nn.Module) -> Delta:
    """As a method would make it: initial values first, a magnitude of what the layer then is."""
    delta = CASES[case](layer)
    if isinstance(delta, Dora):
        inner = delta.inner
        inner.initialise(generator(0, "init"))  # pyright: ignore
        return Dora.of(inner, weight_of(layer), "out" if delta.by_output else "in")
    if hasattr(delta, "initialise") and case != "lokr, first alone":  # files alone hold that one
        delta.initialise(generator(0, "init"))  # pyright: ignore
    return delta


@pytest.mark.parametrize(("case", "kind"), [(c, k) for c in CASES for k in LAYERS if suits(c, make_layer(k))])
def test_a_new_delta_changes_nothing_to_the_bit(case: str, kind: str) -> None:
    layer = make_layer(kind).float()
    x = make_input(layer)
    x = x.float() if x.is_floating_point() else x
    delta, plain = begun(case, layer), layer(x)
    assert not delta.weight(weight_of(layer)).any()
    with attach(nn.ModuleDict({"layer": layer}), {"layer": delta}):
        out = layer(x)
        assert torch.equal(out, plain)
    if case != "lokr, first alone":  # and it is no dead end
        out.square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in delta.parameters())


#: kind -> ours, LyCORIS' class and its options, the layer; large enough for statistics
DRAWN: dict[str, tuple[Callable[[], Any], str, dict[str, Any], Callable[[], nn.Module]]] = {
    "loha": (lambda: Hadamard((256, 256), 16), "loha.LohaModule", {}, lambda: nn.Linear(256, 256, device="meta")),
    "loha, tucker": (lambda: Hadamard((256, 256, 3, 3), 16, tucker=True), "loha.LohaModule", {"use_tucker": True},
                     lambda: nn.Conv2d(256, 256, 3, device="meta")),
    "lokr": (lambda: Kronecker((4096, 4096), 16, factor=64), "lokr.LokrModule", {"factor": 64},
             lambda: nn.Linear(4096, 4096, device="meta")),
    "lokr, both": (lambda: Kronecker((4096, 4096), 16, factor=64, decompose_both=True), "lokr.LokrModule",
                   {"factor": 64, "decompose_both": True}, lambda: nn.Linear(4096, 4096, device="meta")),
    "lokr, full": (lambda: Kronecker((4096, 4096), 16, full=True), "lokr.LokrModule", {"full_matrix": True},
                   lambda: nn.Linear(4096, 4096, device="meta")),
    "lokr, tucker": (lambda: Kronecker((4096, 4096, 3, 3), 16, factor=64, tucker=True), "lokr.LokrModule",
                     {"factor": 64, "use_tucker": True}, lambda: nn.Conv2d(4096, 4096, 3, device="meta")),
    "lora": (lambda: LowRank((256, 64, 3, 3), 16), "locon.LoConModule", {},
             lambda: nn.Conv2d(64, 256, 3, device="meta")),
    "lora, tucker": (lambda: LowRank((256, 256, 3, 3), 16, tucker=True), "locon.LoConModule", {"use_tucker": True},
                     lambda: nn.Conv2d(256, 256, 3, device="meta")),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_initial_values_are_distributed_as_in_lycoris(kind: str) -> None:
    """Factor by factor: zeros where zeros are, else mean, spread and shape (normal or uniform) of two samples."""
    lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed", exc_type=ImportError)
    make, name, options, layer = DRAWN[kind]
    ours = make()
    ours.initialise(generator(0, "init"))
    torch.manual_seed(0)
    module, _, cls = name.partition(".")
    theirs = getattr(getattr(lycoris, module), cls)("layer", layer(), lora_dim=16, **options)
    names = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
    prefix = {"loha": "hada_", "lokr": "lokr_"}.get(module, "")
    factors = dict(theirs.named_parameters())
    assert {names.get(n, prefix + n) for n, _ in ours.named_parameters()} == set(factors)
    zeros = 0
    for ours_name, factor in ours.named_parameters():
        assert_drawn_alike(factor.detach(), factors[names.get(ours_name, prefix + ours_name)].detach())
        zeros += not factor.any()
    assert zeros == 1


def assert_drawn_alike(one: Tensor, other: Tensor) -> None:
    """Bounds of five standard errors, of the wider of both distributions."""
    assert one.shape == other.shape
    if not other.any():
        assert not one.any()
        return
    n, sigma = one.numel(), float(other.std())
    assert n >= 1000
    assert abs(float(one.mean() - other.mean())) < 5 * sigma * math.sqrt(2 / n)
    assert abs(math.log(float(one.std()) / sigma)) < 5 * math.sqrt(1 / n)
    fourth = [float((sample / sample.std()).pow(4).mean()) for sample in (one, other)]  # normal: 3; uniform: 1.8
    assert abs(fourth[0] - fourth[1]) < 0.6


def test_initial_values_depend_on_the_generator_alone() -> None:
    for make, *_ in DRAWN.values():
        one, two, other = make(), make(), make()
        for delta, seed in ((one, 0), (two, 0), (other, 1)):
            torch.rand(1)
            delta.initialise(generator(seed, "init"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- factors that make no delta -----------------------------------------------------------------------------


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


LOHA = {"w1_a": ones(6, 2), "w1_b": ones(2, 5), "w2_a": ones(6, 2), "w2_b": ones(2, 5)}
CORE = {"w1_a": ones(2, 6), "w1_b": ones(2, 5), "w2_a": ones(2, 6), "w2_b": ones(2, 5)}
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a loha of rank 0": (lambda: Hadamard((6, 5), 0), "rank is 0; a rank is 1 or more"),
    "a lokr of rank 0": (lambda: Kronecker((6, 5), 0), "rank is 0; a rank is 1 or more"),
    "a core of a linear layer": (lambda: LowRank((6, 5), 2, tucker=True),
                                 r"a layer of shape \(6, 5\) has no kernel for a Tucker core"),
    "loha of another width": (lambda: Hadamard.from_factors((6, 5), **{**LOHA, "w2_b": ones(2, 7)}),
                              r"w2_b is \(2, 7\), where a change of \(6, 5\) of rank 2 has \(2, 5\)"),
    "loha of two ranks": (lambda: Hadamard.from_factors((6, 5), **{**LOHA, "w2_a": ones(6, 3), "w2_b": ones(3, 5)}),
                          r"w2_a is \(6, 3\), where a change of \(6, 5\) of rank 2 has \(6, 2\)"),
    "loha of another layer": (lambda: Hadamard.from_factors((5, 6), **LOHA), r"w1_a is \(6, 2\), where"),
    "loha of one core": (lambda: Hadamard.from_factors((6, 5, 3, 3), **CORE, t1=ones(2, 2, 3, 3)),
                         "one half has a Tucker core and the other has none"),
    "loha of another kernel": (
        lambda: Hadamard.from_factors((6, 5, 3, 3), **CORE, t1=ones(2, 2, 3, 3), t2=ones(2, 2, 1, 1)),
        r"t2 is \(2, 2, 1, 1\), where a change of \(6, 5, 3, 3\) of rank 2 has \(2, 2, 3, 3\)"),
    "lokr of one matrix": (lambda: Kronecker.from_factors((6, 4), w1=ones(2, 2)),
                           "w2 is wanted, or both w2_a and w2_b; there are w1"),
    "lokr of half a product": (lambda: Kronecker.from_factors((6, 4), w1_a=ones(2, 1), w2=ones(3, 2)),
                               "w1 is wanted, or both w1_a and w1_b; there are w1_a, w2"),
    "lokr of a matrix and its product": (
        lambda: Kronecker.from_factors((6, 4), w1=ones(2, 2), w1_a=ones(2, 1), w1_b=ones(1, 2), w2=ones(3, 2)),
        "w1 is wanted, or both w1_a and w1_b; there are w1, w1_a, w1_b, w2"),
    "lokr of a core and a whole": (
        lambda: Kronecker.from_factors((6, 4, 3, 3), w1=ones(2, 2), w2=ones(3, 2, 3, 3), t2=ones(1, 1, 3, 3)),
        "a Tucker core t2 belongs to w2_a and w2_b, not to a whole w2"),
    "lokr of another size": (lambda: Kronecker.from_factors((6, 5), w1=ones(2, 2), w2=ones(3, 2)),
                             r"factors w1 \(2, 2\), w2 \(3, 2\) do not make a change of \(6, 5\)"),
    "lokr of two ranks": (
        lambda: Kronecker.from_factors((6, 4), w1=ones(2, 2), w2_a=ones(3, 1), w2_b=ones(2, 2)),
        r"factors w1 \(2, 2\), w2_a \(3, 1\), w2_b \(2, 2\) do not make a change of \(6, 4\)"),
    "lokr without a kernel": (lambda: Kronecker.from_factors((6, 4, 3, 3), w1=ones(2, 2), w2=ones(3, 2)),
                              r"do not make a change of \(6, 4, 3, 3\)"),
    "lokr of a vector": (lambda: Kronecker.from_factors((6, 4), w1=ones(4), w2=ones(3, 2)),
                         r"factors w1 \(4,\), w2 \(3, 2\) do not make a change of \(6, 4\)"),
    "lora with another core": (lambda: LowRank.from_factors(ones(6, 2, 1, 1), ones(2, 5, 1, 1), 2.0, ones(3, 3, 3, 3)),
                               r"factors \(3, 3, 3, 3\) and \(2, 5, 1, 1\) do not fit together"),
    "lora with two kernels": (lambda: LowRank.from_factors(ones(6, 2, 1, 1), ones(2, 5, 3, 3), 2.0, ones(2, 2, 3, 3)),
                              r"factors \(2, 2, 3, 3\) and \(2, 5, 3, 3\) do not fit together"),
    "a dense nothing": (lambda: Dense.from_weight(), "neither a change of the weight nor of the bias"),
    "a bias of another width": (lambda: Dense.from_weight(ones(6, 5), ones(5)),
                                r"a change \(5,\) of the bias does not fit one \(6, 5\) of the weight"),
    "a bias that is a matrix": (lambda: Dense.from_weight(None, ones(6, 1)), r"a change \(6, 1\) of the bias"),
    "a magnitude of a bias": (lambda: Dora(Dense.from_weight(ones(6, 5), ones(6)), ones(6, 1)),
                              r"a dense delta of shape \(6, 5\) has no magnitude to train apart"),
    "a magnitude of a magnitude": (lambda: Dora(Dora(LowRank((6, 5), 1), ones(6, 1)), ones(6, 1)),
                                   "a dora delta .* has no magnitude"),
    "a magnitude of another width": (lambda: Dora(LowRank((6, 5), 1), ones(5, 1)),
                                     r"a magnitude \(5, 1\) does not fit a change of \(6, 5\)"),
    "a flat magnitude": (lambda: Dora(LowRank((6, 5), 1), ones(6)), r"a magnitude \(6,\) does not fit"),
    "a dora without its base": (lambda: Dora(LowRank((6, 5), 1), ones(6, 1)).weight(),
                                "a DoRA's change depends on the base's weight; give the base"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_factors_that_make_no_delta_are_refused(what: str) -> None:
    make, said = REFUSED[what]
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_factors_are_kept_as_they_are() -> None:
    w = {"w1": ones(2, 2).bfloat16(), "w2": ones(3, 2).half()}
    delta = Kronecker.from_factors((6, 4), **w)
    assert delta.w1 is not None and delta.w1.dtype == torch.bfloat16 and delta.w1.data_ptr() == w["w1"].data_ptr()
    assert delta.weight().dtype == torch.float32 and not any(p.requires_grad for p in delta.parameters())
    whole = Kronecker.from_factors((6, 4), **{name: factor.double() for name, factor in w.items()})
    assert_close(delta.weight().double(), whole.weight())
