"""LoHa and LoKr as methods, on a miniature Stable Diffusion 1.x: which layers, what size, and what they leave."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.attach import attach
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.families.apply import apply
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.methods.loha import LoHa
from impasto.methods.lokr import LoKr
from impasto.methods.weights import LayerMethod
from tests.checkpoints import write_checkpoint

METHODS: dict[str, Any] = {"loha": LoHa, "lokr": LoKr}
both = pytest.mark.parametrize("kind", METHODS)
EVERYWHERE = ["all", "text-encoder"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors")


@pytest.fixture(scope="module")
def base(mini: Path) -> Base:
    """To be left as it is: methods on it are taken off again."""
    return load_base(mini)


def method_of(kind: str, **options: Any) -> LayerMethod:
    return METHODS[kind](METHODS[kind].Options.model_validate({"kind": kind, **options}))


def prepared(base: Base, kind: str, **options: Any) -> LayerMethod:
    """A method, prepared and taken off again."""
    method = method_of(kind, **options)
    method.prepare(base, 0)
    method.attachment.detach()
    return method


def sizes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


# --- which layers, what size --------------------------------------------------------------------------------


@both
def test_targets_exclusions_ranks_and_alphas(base: Base, kind: str) -> None:
    method = prepared(base, kind, rank=4, targets=["attention", "feed-forward", "text-encoder"], exclude=["attn1"],
                      ranks={"to_k": 2, "ff": 3, "mlp": 0}, alpha=2.0, alphas={"to_q": 1.5}, **(
                          {"factor": 2} if kind == "lokr" else {}))
    found = {path: (delta.rank, delta.alpha) for path, delta in method.deltas.items()}  # pyright: ignore
    wanted = [path for word in ("attention", "feed-forward", "text-encoder") for path in base.targets(word)
              if "attn1" not in path and "mlp" not in path]
    assert list(found) == wanted and len(wanted) > 20
    for path, (rank, alpha) in found.items():
        assert rank == (2 if "to_k" in path else 3 if ".ff." in path else 4), path
        assert alpha == (1.5 if "to_q" in path else 2.0), path
    assert method.trains(base) == {"unet", "text_encoder"}


def test_defaults(base: Base) -> None:
    """Attention alone; the strength of a new delta is that of its factors."""
    loha, lokr = prepared(base, "loha"), prepared(base, "lokr")
    for method in (loha, lokr):
        assert list(method.deltas) == base.targets("attention")
        assert all(delta.scale == 1 for delta in method.deltas.values())  # pyright: ignore
        assert not list(method.remarks()) or method is lokr
    assert all(isinstance(delta, Hadamard) and delta.rank == 8 for delta in loha.deltas.values())
    assert all(isinstance(delta, Kronecker) for delta in lokr.deltas.values())


@both
def test_tucker_cores_only_where_there_is_a_kernel(base: Base, kind: str) -> None:
    options = {"factor": 2} if kind == "lokr" else {}
    method = prepared(base, kind, rank=4, targets=EVERYWHERE, tucker=True, **options)
    assert not any("t2" in sizes(delta) for delta in prepared(
        base, kind, rank=4, targets=EVERYWHERE, **options).deltas.values())
    cored = {path for path, delta in method.deltas.items() if "t2" in sizes(delta)}
    assert cored == {path for path, delta in method.deltas.items() if delta.shape[2:] == (3, 3)} and cored
    assert any(delta.shape[2:] == (1, 1) for delta in method.deltas.values())
    assert all(sizes(method.deltas[path])["t2"] == (4, 4, 3, 3) for path in cored)


LYCORIS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("loha", {"rank": 4}, {}), ("loha", {"rank": 2, "tucker": True}, {"use_tucker": True}),
    ("lokr", {"rank": 2}, {}), ("lokr", {"rank": 4}, {}), ("lokr", {"rank": 16, "factor": 4}, {}),
    ("lokr", {"rank": 4, "factor": 5}, {}), ("lokr", {"full": True, "factor": 6}, {"full_matrix": True}),
    ("lokr", {"rank": 1, "decompose_both": True}, {}), ("lokr", {"rank": 2, "tucker": True}, {"use_tucker": True}),
]


@pytest.mark.parametrize(("kind", "ours", "theirs"), LYCORIS)
def test_every_layer_has_the_factors_that_lycoris_would_give_it(base: Base, kind: str, ours: dict[str, Any],
                                                                theirs: dict[str, Any]) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed", exc_type=ImportError)
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    cls, prefix = {"loha": (LohaModule, "hada_"), "lokr": (LokrModule, "lokr_")}[kind]
    same = {key: value for key, value in ours.items() if key in ("factor", "decompose_both")}
    method = prepared(base, kind, alpha=1.0, targets=EVERYWHERE, **ours)
    assert len(method.deltas) > 80
    for path, delta in method.deltas.items():
        wanted = cls("layer", base.layer(path), lora_dim=ours.get("rank", 16), alpha=1.0, **same, **theirs)
        assert {prefix + name: size for name, size in sizes(delta).items()} == sizes(wanted), path
        assert delta.scale == wanted.scale, path  # pyright: ignore


@both
def test_initial_values_are_a_function_of_seed_and_path_alone(base: Base, kind: str) -> None:
    made = [method_of(kind, rank=4, targets=targets) for targets in (["attention"], ["attn2.to_q"], ["attention"])]
    for method, seed in zip(made, (3, 3, 4), strict=True):
        method.prepare(base, seed)
        method.attachment.detach()
    one, two, other = (method.deltas for method in made)
    assert set(two) < set(one)
    for path, delta in two.items():
        assert all(torch.equal(a, b) for a, b in zip(delta.parameters(), one[path].parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(delta.parameters(), other[path].parameters(), strict=True))


# --- remarks ------------------------------------------------------------------------------------------------


def test_what_is_said_of_a_factor_that_does_not_divide(base: Base) -> None:
    """Sides are 32, 64, 128, 256 and 512: by 5 none divides, by 4 all do."""
    (said,) = prepared(base, "lokr", rank=2, factor=5, targets=EVERYWHERE, exclude=[r"resnets", "sampler"]).remarks()
    assert said == ("method lokr: factor 5 does not divide every side of a layer: 32 = 4 · 8, 64 = 4 · 16, "
                    "128 = 4 · 32, 256 = 4 · 64, 512 = 4 · 128")
    assert not list(prepared(base, "lokr", rank=2, factor=4, targets=EVERYWHERE).remarks())
    assert not list(prepared(base, "lokr", rank=2, factor=-1, targets=["attention"]).remarks())
    (said,) = prepared(base, "lokr", full=True, factor=64, targets=["attention"]).remarks()
    assert said == "method lokr: factor 64 does not divide every side of a layer: 32 = 4 · 8"


def test_what_is_said_of_ranks_that_make_a_factor_whole(base: Base) -> None:
    """32 = 4 · 8 and 64 = 8 · 8: from rank 4 on the larger matrix is whole."""
    for rank, whole in ((3, 0), (4, 32), (16, 32)):
        method = prepared(base, "lokr", rank=rank)
        assert len(method.deltas) == 32
        assert sum("w2" in sizes(delta) for delta in method.deltas.values()) == whole
        said = list(method.remarks())
        assert said == ([f"method lokr: the rank is half of the larger matrix's side or more in {whole} of 32 layers, "
                         "which train it whole, without alpha (LyCORIS' rule)"] if whole else [])
    assert not list(prepared(base, "lokr", full=True).remarks())  # as it was asked for


# --- training and what it leaves ----------------------------------------------------------------------------


def predict(base: Base) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = base.encode_text(["a photo of sks dog", "a cat"])
    return base.predict(latents, torch.tensor([100, 700]), base.condition(text))


@pytest.mark.parametrize(("kind", "options"), [
    ("loha", {"rank": 2, "alpha": 1.0}), ("loha", {"rank": 2, "tucker": True}),
    ("lokr", {"rank": 2, "alpha": 3.0}), ("lokr", {"full": True, "factor": 4}),
    ("lokr", {"rank": 1, "decompose_both": True, "tucker": True}),
])
def test_from_training_to_another_base_and_into_its_weights(mini: Path, tmp_path: Path, kind: str,
                                                            options: dict[str, Any]) -> None:
    base, other = load_base(mini), load_base(mini)
    before = predict(base)
    method = method_of(kind, targets=EVERYWHERE, **options)
    groups = method.prepare(base, 0)
    assert torch.equal(predict(base), before)
    assert {group["name"] for group in groups} == {f"{kind} unet", f"{kind} text_encoder"}
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=1e-2)
    for _ in range(3):
        predict(base).square().mean().backward()
        optimizer.step()
        assert all(any(p.grad is not None and p.grad.any() for p in d.parameters()) for d in method.deltas.values())
        optimizer.zero_grad()
    # every factor has moved, those that begin at zero too
    assert all(parameter.any() for delta in method.deltas.values() for parameter in delta.parameters())
    trained = predict(base).detach()
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5 * float(trained.abs().max())}
    assert float((trained - before).norm() / before.norm()) > 0.01

    adapter = method.adapter()
    with attach(other.components, adapter):
        assert_close(predict(other), trained, **tolerance)
    save_adapter(adapter, tmp_path / "dog.safetensors", dtype=torch.float32)
    attachment = apply(other, load_adapter(tmp_path / "dog.safetensors"))
    assert_close(predict(other), trained, **tolerance)
    attachment.detach()
    assert torch.equal(predict(other), before)
    attach(other.components, adapter).merge()
    assert_close(predict(other), trained, **tolerance)
    with method.off():
        assert torch.equal(predict(base), before)


# --- what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_rank_that_a_layer_cannot_use(base: Base, kind: str) -> None:
    with pytest.raises(UserError, match=r"unet.conv_out: rank 8 is more than this layer can use.*being 4; .*0 leaves"):
        method_of(kind, rank=8, targets=["conv_out"]).prepare(base, 0)
    assert list(prepared(base, kind, rank=8, targets=["conv_out", "conv_in"], ranks={"conv_out": 0}).deltas) == [
        "unet.conv_in"]


def test_whole_matrices_have_no_rank_that_could_be_too_large(base: Base) -> None:
    for options in ({}, {"rank": 1000}, {"ranks": {"conv_out": 77}}):
        method = prepared(base, "lokr", full=True, targets=["conv_out", "to_q"], exclude=["attn1"], **options)
        assert sizes(method.deltas["unet.conv_out"]) == {"w1": (2, 4), "w2": (2, 8, 3, 3)}
        assert list(method.deltas) == [*base.targets("conv_out"), *(
            path for path in base.targets("to_q") if "attn1" not in path)]
    method = prepared(base, "lokr", full=True, targets=["conv_out", "to_q"], ranks={"conv_out": 0})
    assert method.deltas and "unet.conv_out" not in method.deltas


@pytest.mark.parametrize(("kind", "options"), [
    ("lokr", {"factor": 0}), ("lokr", {"factor": -2}), ("lokr", {"factor": 2.5}), ("lokr", {"rank": 0}),
    ("loha", {"rank": 0}), ("loha", {"factor": 4}), ("loha", {"full": True}), ("lokr", {"dropout": 0.1}),
    ("loha", {"tucker": "sometimes"}), ("lokr", {"factor": "root"}),
])
def test_options_out_of_range(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        method_of(kind, **options)
