"""What a run holds where it saves memory: closed forms of what comes late, goes early, or lies elsewhere."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from impasto.families.blocks import blocks_of
from impasto.families.load import load_base
from impasto.methods import METHODS
from impasto.planning.forecast import Forecast
from impasto.planning.ledger import Ledger
from impasto.training import offload, rounding
from impasto.training.offload import Blocks
from tests.planning import toy
from tests.planning.test_memory import mini, planned  # noqa: F401 - a fixture


def on_card(count: int) -> int:
    """Bytes of so many numbers in fp32, as CUDA's allocator counts them."""
    return -(-4 * count // 512) * 512


def sizes(network: nn.Module) -> list[int]:
    return [on_card(weight.numel()) for weight in network.parameters()]


@pytest.fixture(scope="module")
def unet(mini: Path) -> nn.Module:  # noqa: F811
    return load_base(mini).denoiser


# --- steps inside the backward ---------------------------------------------------------------------------
def test_a_fused_backward_has_no_gradients_together(mini: Path, unet: nn.Module) -> None:  # noqa: F811
    plain, fused = (planned({"path": str(mini)}, "cuda", data={"resolution": 32}, train={
        "clip": 0.0, "checkpointing": True, "fused_backward": fused}) for fused in (False, True))
    gradients, largest, count = sum(sizes(unet)), max(sizes(unet)), len(sizes(unet))
    assert plain.moments["optimizer step"] - fused.moments["optimizer step"] == pytest.approx(gradients, abs=2048)
    # of the backward's own peaks, one comes with all gradients, the other with the one in hand and each one's norm
    assert plain.moments["backward"] - fused.moments["backward"] >= gradients - 2 * largest - 512 * count
    assert fused.parts.get("gradients", 0) <= largest < plain.parts["gradients"]


# --- what waits elsewhere --------------------------------------------------------------------------------
def test_states_that_wait_elsewhere_leave_the_card(mini: Path, unet: nn.Module,  # noqa: F811
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW has two moments for each weight, and a counter; they are there for the step of their weight alone."""
    monkeypatch.setattr(rounding, "BUCKET", 1)
    plain, away = (planned({"path": str(mini)}, "cuda", train={"offload": what}) for what in ([], ["optimizer"]))
    states = sum(2 * size + 512 for size in sizes(unet))
    assert plain.parts["optimizer"] == states
    assert plain.moments["backward"] - away.moments["backward"] == states
    assert plain.moments["optimizer step"] - away.moments["optimizer step"] == pytest.approx(
        states - 2 * max(sizes(unet)), abs=2048 + 512 * len(sizes(unet)))
    here = planned({"path": str(mini)}, "cpu", train={"offload": ["optimizer"]})
    assert here.moments == planned({"path": str(mini)}, "cpu").moments  # which has no other memory


@pytest.mark.parametrize(("count", "left"), [(offload.LEAST // 4, 0), (offload.LEAST // 4 - 128, offload.LEAST - 512)])
def test_what_is_kept_waits_elsewhere_from_a_size_on(
        mini: Path, monkeypatch: pytest.MonkeyPatch, count: int, left: int) -> None:  # noqa: F811
    """Of a method that keeps so many numbers more, bytes that this costs; the miniature keeps nothing so large."""
    monkeypatch.setitem(METHODS.entries, "toy", "tests.planning.toy:Toy")
    monkeypatch.setattr(toy, "KEPT", count)

    def costs(device: str, what: list[str]) -> int:
        plain, keeping = (planned({"path": str(mini)}, device, kind, train={"offload": what})
                          for kind in ("full", "toy"))
        return keeping.moments["backward"] - plain.moments["backward"]

    assert costs("cuda", []) == 4 * count and costs("cuda", ["activations"]) == left
    assert costs("cpu", ["activations"]) == 4 * count


def test_of_blocks_that_wait_elsewhere_two_are_on_the_card(mini: Path, unet: nn.Module) -> None:  # noqa: F811
    def of(device: str, what: list[str]) -> Forecast:
        return planned({"path": str(mini)}, device, "lora", train={"checkpointing": True, "offload": what})

    blocks = [sum(sizes(block)) for block in blocks_of(unet).values()]
    for moment in ("forward", "backward"):
        gone = of("cuda", []).moments[moment] - of("cuda", ["blocks"]).moments[moment]
        assert sum(blocks) - 2 * max(blocks) <= gone < sum(blocks)
    assert of("cpu", ["blocks"]).moments == of("cpu", []).moments


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_come_one_by_one_with_the_next_on_its_way(fake: bool, ahead: bool) -> None:
    with FakeTensorMode() if fake else nullcontext(), Ledger() as ledger:
        blocks = [nn.Linear(width, width, bias=False).requires_grad_(False) for width in (256, 384, 512, 448)]
        ways = [nn.Linear(a.in_features, b.in_features, bias=False).requires_grad_(False)
                for a, b in pairwise(blocks)]
        for layer in blocks:
            ledger.enter(layer.weight, "unet", weights=True)
        assert ledger.totals["unet"] == 4 * sum(width**2 for width in (256, 384, 512, 448))
        Blocks(blocks, torch.device("cpu"), send=ledger.send, bring=ledger.bring, ahead=ahead)
        assert ledger.totals["unet"] == 0
        held = list[int]()
        x: Any = torch.empty(1, 256, requires_grad=True)
        for block, way in zip(blocks, [*ways, nn.Identity()], strict=True):
            block.register_forward_hook(lambda *_: held.append(ledger.totals["unet"]))  # once it has gone
            x = way(checkpoint(block, x, use_reentrant=False))
        assert held == [4 * width**2 for width in ((384, 512, 448, 0) if ahead else (0, 0, 0, 0))]
        peak = _most(ledger, x.sum())
        assert peak == 4 * (512**2 + 448**2 if ahead else 512**2)


def _most(ledger: Ledger, loss: torch.Tensor) -> int:
    """The most bytes of weights that a backward has at once."""
    most, add = 0, ledger._add

    def added(block: Any) -> None:
        nonlocal most
        add(block)
        most = max(most, ledger.totals["unet"])

    ledger._add = added
    loss.backward()
    return most
