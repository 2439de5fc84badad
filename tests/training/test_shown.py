"""What is shown of a schedule-free run against the library's own eval(), and that nothing of it stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from impasto.training.optimizers import make_optimizer
from impasto.training.sections import TrainOptions
from impasto.training.shown import Shown, answered

pytest.importorskip("schedulefree")
CLASSES = ["schedulefree_adamw", "schedulefree:RAdamScheduleFree", "schedulefree:SGDScheduleFree"]


def trained(name: str, steps: int = 7) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 4))  # the last one rests
    options = TrainOptions.model_validate({"optimizer": name, "learning_rate": 0.05})
    optimizer = make_optimizer([{"params": list(model.parameters()), "lr": None}], options, torch.device("cpu"))
    for step in range(steps):
        optimizer.zero_grad()
        model[:3](torch.sin(torch.arange(16.0) + step).view(2, 8)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", CLASSES)
def test_shown_weights_are_those_of_eval_and_the_live_ones_come_back_bit_for_bit(name: str) -> None:
    model, optimizer = trained(name, 20)  # RAdam's first steps are at rest
    live = values(model)
    theirs, their_optimizer = copy.deepcopy((model, optimizer))
    their_optimizer.eval()
    with answered(optimizer):
        shown = values(model)
    assert all(torch.equal(a, b) for a, b in zip(values(model), live, strict=True))
    for a, b in zip(shown, values(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max((a - b).abs().max() for a, b in zip(shown, live, strict=True)) > 1e-4


def test_why_it_is_not_left_to_the_library() -> None:
    """There and back by eval() and train() is not everywhere what was."""
    weight = nn.Parameter(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    made = TrainOptions.model_validate({"optimizer": CLASSES[0], "learning_rate": 0.05})
    optimizer: Any = make_optimizer([{"params": [weight], "lr": None}], made, torch.device("cpu"))
    for step in range(3):
        weight.grad = torch.sin(torch.arange(100_000.0) * (step + 1))
        optimizer.step()
    live = weight.detach().clone()
    with answered(optimizer):
        pass
    assert torch.equal(weight, live)
    optimizer.eval()
    optimizer.train()
    assert not torch.equal(weight, live) and torch.allclose(weight, live, atol=1e-6)


def test_weights_come_back_when_showing_fails_and_training_goes_on_as_if_nothing_had_been_shown() -> None:
    straight, _ = trained(CLASSES[0], 9)
    model, optimizer = trained(CLASSES[0], 7)
    with pytest.raises(RuntimeError), answered(optimizer):
        raise RuntimeError
    for step in (7, 8):
        optimizer.zero_grad()
        model[:3](torch.sin(torch.arange(16.0) + step).view(2, 8)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(straight), strict=True))


def test_others_answer_for_what_they_train() -> None:
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    before = values(layer)
    with answered(optimizer), Shown(list(layer.parameters()), optimizer, 0.0).weights():
        assert all(torch.equal(a, b) for a, b in zip(values(layer), before, strict=True))


def test_averages_are_of_what_the_optimizer_answers_for() -> None:
    model, optimizer = trained(CLASSES[0])
    start = values(model)
    shown = Shown(list(model.parameters()), optimizer, 0.5)
    shown.update(10)
    live = values(model)
    with answered(optimizer):
        x = values(model)
    with shown.weights():
        for found, a, b in zip(values(model), start, x, strict=True):
            torch.testing.assert_close(found, 0.5 * a + 0.5 * b)
    assert all(torch.equal(a, b) for a, b in zip(values(model), live, strict=True))
