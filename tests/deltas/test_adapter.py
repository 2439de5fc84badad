"""The algebra of adapters against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from tests.deltas.layers import dense_of, make_delta

SHAPES = {"unet.a.to_q": (6, 5), "unet.conv": (4, 3, 3, 3), "text_encoder.up": (5, 7), "unet.line": (4, 3, 2)}
strengths = st.floats(-4, 4, allow_subnormal=False)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """One to four layers, each with a random LoRA of some rank, alpha and kind of scale."""
    layers = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
    return Adapter({layer: (make_delta(SHAPES[layer], draw(st.integers(1, 6)), draw(st.floats(0.1, 9)),
                                       draw(st.integers(0, 99)), rslora=draw(st.booleans())),)
                    for layer in sorted(layers)}, family="sd1")


def dense(adapter: Adapter) -> dict[str, Tensor]:
    return {layer: sum(dense_of(term) for term in terms) for layer, terms in adapter.deltas.items()}


def assert_means(adapter: Adapter, want: dict[str, Tensor]) -> None:
    assert set(adapter.layers) == set(want)
    for layer, dW in want.items():
        assert_close(adapter.dense(layer), dW, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(adapters(), adapters(), strengths, strengths)
def test_sums_and_strengths_are_those_of_dense_matrices(a: Adapter, b: Adapter, s: float, t: float) -> None:
    x, y = dense(a), dense(b)
    layers = x.keys() | y.keys()
    assert_means(a + b, {k: x.get(k, 0) + y.get(k, 0) for k in layers})
    assert_means(a * s, {k: s * v for k, v in x.items()})
    assert_means(s * a + t * b, {k: s * x.get(k, 0) + t * y.get(k, 0) for k in layers})
    assert_means((a + b) * s, {k: s * (x.get(k, 0) + y.get(k, 0)) for k in layers})
    assert_means(a, x)  # the operands are left as they were
    assert_means(b, y)


@settings(max_examples=20, deadline=None)
@given(adapters(), adapters(), adapters())
def test_sums_are_associative_and_commutative(a: Adapter, b: Adapter, c: Adapter) -> None:
    assert_means((a + b) + c, dense(a + (b + c)))
    assert_means(b + a, dense(a + b))
    assert_means(a + a * -1, {k: torch.zeros_like(v) for k, v in dense(a).items()})


def test_sums_of_low_rank_are_concatenations() -> None:
    a, b = Adapter({"unet.x": (make_delta((6, 5), 2),)}), Adapter({"unet.x": (make_delta((6, 5), 3, seed=1),)})
    (term,) = (a + b).deltas["unet.x"]
    assert term.rank == 5


def test_a_mean_of_the_factors_would_be_another_matrix() -> None:
    """What the field's default still does when it mixes two LoRAs: some three quarters away from the true mean."""
    one, two = make_delta((64, 64), 8, 8.0, 1), make_delta((64, 64), 8, 8.0, 2)
    true = (0.5 * Adapter({"x": (one,)}) + 0.5 * Adapter({"x": (two,)})).dense("x")
    averaged = (one.up + two.up) @ (one.down + two.down) / 4
    assert 0.6 < float((averaged - true).norm() / true.norm()) < 0.8


class Quotient(Delta):
    """A stand-in for a kind that is not linear and cannot be joined: dW = W / 2."""

    kind = "quotient"
    linear = False

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def weight(self, W: Tensor | None = None) -> Tensor:
        assert W is not None
        return W / 2

    def scaled(self, strength: float) -> Quotient:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, tensors: object) -> Quotient:
        raise NotImplementedError


def test_kinds_that_depend_on_the_base_have_no_sum_without_it() -> None:
    a, b = Adapter({"unet.x": (Quotient((2, 2)),)}), Adapter({"unet.x": (make_delta((2, 2), 1),)})
    for one, two in ((a, b), (b, a)):
        with pytest.raises(UserError, match="unet.x.*without the base"):
            one + two
    with pytest.raises(UserError, match="give the base"):
        a.dense("unet.x")
    assert_close(a.dense("unet.x", torch.ones(2, 2)), torch.full((2, 2), 0.5))


class Shy(Quotient):
    """Linear, but joins with nothing."""

    kind = "shy"
    linear = True

    def weight(self, W: Tensor | None = None) -> Tensor:
        return torch.ones(self.shape, dtype=torch.float64)


def test_kinds_that_cannot_be_joined_stand_side_by_side() -> None:
    one = make_delta((2, 2), 1)
    a, b = Adapter({"unet.x": (Shy((2, 2)),)}), Adapter({"unet.x": (one,)})
    for total in (a + b, b + a):
        assert len(total.deltas["unet.x"]) == 2
        assert_close(total.dense("unet.x"), dense_of(one) + 1)
    assert len((a + b + b).deltas["unet.x"]) == 2  # the second LoRA joined the first


def test_other_families_and_shapes_cannot_be_added() -> None:
    a = Adapter({"unet.x": (make_delta((6, 5)),)}, family="sd1")
    with pytest.raises(UserError, match="sd1 and sdxl"):
        a + Adapter({}, family="sdxl")
    with pytest.raises(UserError, match=r"unet.x.*\(6, 5\).*\(6, 7\)"):
        a + Adapter({"unet.x": (make_delta((6, 7)),)}, family="sd1")
    bias = Adapter({"unet.x": (Dense.from_weight(None, torch.ones(6)),)})
    for one, two in ((bias + a, make_delta((6, 7))), (a + bias, make_delta((6, 7))),
                     (bias, make_delta((4, 5))), (bias, Dense.from_weight(None, torch.ones(4))),
                     (bias + a, Dense.from_weight(None, torch.ones(4)))):
        with pytest.raises(UserError, match=r"unet.x.*made for different bases"):
            one + Adapter({"unet.x": (two,)})
    assert_close((bias + a).dense("unet.x"), a.dense("unet.x"))
    assert (a + Adapter({})).family == (Adapter({}) + a).family == "sd1"


def test_what_two_adapters_say_of_themselves() -> None:
    a = Adapter({}, {"title": "a", "seed": "1", "only": "a"}, base={"unet": "1", "text_encoder": "2"})
    b = Adapter({}, {"title": "b", "seed": "1"}, base={"unet": "9", "vae": "3"})
    total = a + b
    assert total.metadata == {"seed": "1", "only": "a"}
    assert total.base == {"text_encoder": "2", "vae": "3"}


def test_only_numbers_scale_and_only_adapters_add() -> None:
    a = Adapter({})
    with pytest.raises(TypeError):
        a * "2"  # type: ignore[operator]
    with pytest.raises(TypeError):
        a + 1  # type: ignore[operator]


def test_tokens_are_carried_along_as_they_are() -> None:
    cat, dog = ({"text_encoder": torch.randn(n, 8)} for n in (1, 2))
    one, other = Adapter({}, embeddings={"<cat>": cat}), Adapter({}, embeddings={"<dog>": dog})
    both = 0.5 * one + other
    assert both.embeddings == {"<cat>": cat, "<dog>": dog} and not both.empty and Adapter({}).empty
    assert (both + one).embeddings == both.embeddings  # the same thing twice is one thing


def test_a_token_that_is_two_things_is_refused() -> None:
    one, other = (Adapter({}, embeddings={"<cat>": {"text_encoder": torch.randn(1, 8)}}) for _ in range(2))
    with pytest.raises(UserError, match="<cat>: is another thing in each.*under another token"):
        one + other
