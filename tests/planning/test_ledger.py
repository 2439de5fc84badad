"""The ledger of storages, on real tensors and on fake ones."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode

from impasto.planning.ledger import Ledger


@pytest.fixture(params=["real", "fake"])
def ledger(request: pytest.FixtureRequest):
    with FakeTensorMode() if request.param == "fake" else nullcontext(), Ledger() as ledger:
        yield ledger


def test_what_comes_is_counted_until_its_last_view_goes(ledger: Ledger) -> None:
    x = torch.empty(100)
    view = x[10:20]
    del x
    assert ledger.now == 400
    y = torch.empty(50)
    del view
    assert ledger.now == 200 and ledger.peak.total == 600
    del y
    assert ledger.now == 0 and ledger.peak.total == 600
    assert ledger.events == [(1, 400), (2, 200), (1, 0), (2, 0)]


def test_work_in_place_takes_nothing(ledger: Ledger) -> None:
    x = torch.empty(100)
    x.add_(1).mul_(2)
    assert ledger.now == ledger.peak.total == 400


def test_the_peak_says_what_it_was_for_and_when(ledger: Ledger) -> None:
    weight = torch.empty(10)
    ledger.enter(weight, "unet", weights=True)
    with ledger.at("forward"):
        half = weight.bfloat16()
        other = half + 1
    ledger.enter(weight, "unet")
    assert ledger.peak.parts == {"unet": 40, "autocast": 20, "temporaries": 20}
    assert ledger.peak.moment == "forward" and ledger.peaks["forward"].total == 80
    del other


def test_what_lies_elsewhere_is_not_counted(ledger: Ledger) -> None:
    x, y = torch.empty(100), torch.empty(1)
    ledger.move([x], here=False)
    assert ledger.now == 4
    ledger.move([x, y], here=True)
    assert ledger.now == 404
    ledger.move([x], here=False)
    del x
    assert ledger.now == 4


def test_a_copy_elsewhere_is_not_counted_and_comes_back_for_what_it_was(ledger: Ledger) -> None:
    x = torch.empty(100)
    ledger.enter(x, "unet", weights=True)
    there = ledger.send(x)
    assert there is not x and ledger.now == 400 and ledger.peak.total == 400
    assert ledger.send(there) is there and ledger.send(x, there) is there and ledger.bring(x) is x
    del x
    assert ledger.now == 0
    back = ledger.bring(there)
    half = back.bfloat16()
    assert +ledger.totals == {"unet": 400, "autocast": 200} and ledger.peak.parts == ledger.totals
    del there, back, half
    assert ledger.now == 0 and not ledger.blocks


def test_sizes_are_rounded() -> None:
    with Ledger(512) as ledger:
        x = torch.empty(129)
        assert ledger.now == 1024
        del x


def test_what_autograd_keeps_is_activations_and_gradients_are_gradients(ledger: Ledger) -> None:
    weight = torch.empty(8, 8, requires_grad=True)
    ledger.enter(weight, "adapter", weights=True)
    ledger.gradients_of([weight])  # pyright: ignore[reportArgumentType]
    x = torch.empty(4, 8)
    with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda kept: kept):
        y = (x @ weight).exp()
        loss = y.sum()
    assert ledger.totals["activations"] == 2 * 4 * 8 * 4  # x, and exp's own output
    loss.backward()
    assert ledger.totals["gradients"] == 8 * 8 * 4
    del y, loss


def test_products_are_counted_once_forward_and_twice_backward(ledger: Ledger) -> None:
    weight, x = torch.empty(8, 16, requires_grad=True), torch.empty(4, 8, requires_grad=True)
    with ledger.at("forward"):
        loss = (x @ weight).sum()
    with ledger.at("backward"):
        loss.backward()
    once = 2 * 4 * 8 * 16
    assert ledger.flops == {"forward": once, "backward": 2 * once}


def test_what_the_backward_computes_again_is_told_apart(ledger: Ledger) -> None:
    weight, x = torch.empty(8, 16, requires_grad=True), torch.empty(4, 8, requires_grad=True)
    with ledger.at("forward"):
        loss = torch.utils.checkpoint.checkpoint(lambda: (x @ weight).exp(), use_reentrant=False).sum()
    with ledger.at("backward"):
        loss.backward()
    once = 2 * 4 * 8 * 16
    assert ledger.flops == {"forward": once, "backward": 2 * once, "recomputed": once}
