"""Rates against transformers' schedules; AdamW against its formula."""

from __future__ import annotations

import pytest
import torch
import transformers

from impasto.core.errors import UserError
from impasto.training.environment import Precision, choose_device
from impasto.training.optimizers import make_optimizer, rate_factor, set_rates
from impasto.training.recipe import TrainOptions


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_equal_those_of_transformers(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_scheduler("constant_with_warmup" if schedule == "constant" else schedule, optimizer,
                                        num_warmup_steps=warmup, num_training_steps=50)
    options = TrainOptions(schedule=schedule, warmup=warmup)
    for step in range(50):
        assert rate_factor(step, 50, options) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_adamw_follows_its_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    options = TrainOptions(learning_rate=0.1, weight_decay=0.02, betas=(0.8, 0.95), eps=1e-6)
    optimizer = make_optimizer([{"params": [weight], "lr": None}], options, torch.device("cpu"))
    w, m, v = weight.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for t in range(1, 6):
        factor = rate_factor(t - 1, 5, options)
        set_rates(optimizer, factor)
        weight.grad = torch.tensor([0.5 * t, -1.0 / t], dtype=torch.float64)
        g, lr = weight.grad.clone(), 0.1 * factor
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g  # Loshchilov & Hutter 2019, Algorithm 2
        w = w - lr * 0.02 * w - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        torch.testing.assert_close(weight.detach(), w, rtol=1e-9, atol=1e-12)


def test_groups_keep_their_own_rates() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([{"params": [a], "lr": None}, {"params": [b], "lr": 5e-6}],
                               TrainOptions(learning_rate=1e-4), torch.device("cpu"))
    set_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 2.5e-6]


def test_precision_and_device_say_what_cannot_be() -> None:
    with pytest.raises(UserError, match="fp16 training needs a CUDA device"):
        Precision.choose("fp16", torch.device("cpu"))
    assert Precision.choose("auto", torch.device("cpu")).dtype == torch.float32
    with pytest.raises(UserError, match="device 'gpu' cannot be used"):
        choose_device("gpu")
