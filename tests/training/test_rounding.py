"""Steps on weights in bf16: unbiased rounding, the fp32 step otherwise, and nothing in fp32 left behind."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import bitsandbytes
import prodigyopt
import pytest
import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.training import rounding
from impasto.training.optimizer_state import pack_optimizer, unpack_optimizer
from impasto.training.rounding import Steps, stochastically_rounded

OFF = torch.amp.GradScaler("cpu", enabled=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: float) -> tuple[Tensor, Tensor]:
    """The two numbers of bf16 around one that is none, in float64: spaced by 2^(e - 7) within [2^e, 2^(e + 1))."""
    space = 2.0 ** (math.floor(math.log2(abs(value))) - 7)
    low = math.floor(value / space) * space
    return torch.tensor(low, dtype=torch.float64), torch.tensor(low + space, dtype=torch.float64)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -0.0123, 1e-30, 12345.678])
def test_rounding_is_to_a_neighbour_and_unbiased(value: float) -> None:
    count = 40_000
    exact = torch.tensor(value).double()  # as fp32 has it
    rounded = stochastically_rounded(torch.full((count,), value), generator()).double()
    low, high = neighbours(exact.item())
    assert set(rounded.unique().tolist()) == {low.item(), high.item()}
    # a coin of probability p = (x - low) / (high - low): the mean's own deviation is √(p (1 - p) / n) of the space
    p = ((exact - low) / (high - low)).item()
    error = (rounded.mean() - exact).abs() / (high - low)
    assert error < 4.5 * math.sqrt(p * (1 - p) / count)


def test_what_bf16_has_already_stays_and_what_is_no_number_too() -> None:
    kept = torch.cat([torch.randn(1000, generator=generator()).bfloat16().float(),
                      torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40])])
    kept[-1] = torch.tensor(1e-40).bfloat16().float()  # below the normal numbers
    assert torch.equal(stochastically_rounded(kept, generator()).float(), kept)
    assert stochastically_rounded(torch.tensor([math.nan, -math.nan]), generator()).isnan().all()


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(40, 30, dtype=dtype)
        self.b = nn.Linear(20, 10)  # stays fp32 in any case
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(i)).bfloat16())


def gradients(net: nn.Module, step: int) -> None:
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator(100 * step + i)).to(parameter.dtype)


def made(dtype: torch.dtype, kind: Any = torch.optim.AdamW) -> tuple[Net, torch.optim.Optimizer, Steps]:
    net = Net(dtype)
    groups = [{"params": list(net.a.parameters()), "lr": 1e-4}, {"params": list(net.b.parameters()), "lr": 1e-3}]
    optimizer = kind(groups)
    return net, optimizer, Steps(optimizer, {"net": net}, seed=3)


@pytest.mark.parametrize("bucket", [1, 1_210, 2**24])
def test_a_step_is_the_fp32_one_rounded(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights and gradients; however many weights are widened at once."""
    monkeypatch.setattr(rounding, "BUCKET", bucket)
    net, optimizer, steps = made(torch.bfloat16)
    wide = copy.deepcopy(net).float()
    gradients(net, 0)
    for narrow, parameter in zip(net.parameters(), wide.parameters(), strict=True):
        assert narrow.grad is not None
        parameter.grad = narrow.grad.float()
    reference = torch.optim.AdamW([{"params": list(wide.a.parameters()), "lr": 1e-4},
                                   {"params": list(wide.b.parameters()), "lr": 1e-3}])
    reference.step()
    groups = [list(group["params"]) for group in optimizer.param_groups]
    steps.take(0, OFF)
    assert torch.equal(net.b.weight, wide.b.weight) and torch.equal(net.b.bias, wide.b.bias)
    for name in ("weight", "bias"):
        narrow, exact = net.a.get_parameter(name), wide.a.get_parameter(name)
        assert narrow.dtype == torch.bfloat16
        assert ((narrow.float() - exact).abs() <= 2.0**-7 * exact.abs()).all()  # one of its neighbours
        state = optimizer.state[narrow]
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], reference.state[exact]["exp_avg"])
        assert state["step"].item() == 1
    assert all(a is b for before, group in zip(groups, optimizer.param_groups, strict=True)
               for a, b in zip(before, group["params"], strict=True))


def test_small_updates_add_up_in_the_mean() -> None:
    """400 steps by a two-thousandth each, of weights of 1, which rounding to the nearest would never move."""
    net = nn.Linear(100, 100, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(net.weight)
    steps = Steps(torch.optim.SGD(net.parameters(), lr=1 / 2048), {"net": net}, seed=0)
    for step in range(400):
        net.weight.grad = torch.ones_like(net.weight)
        steps.take(step, OFF)
    assert net.weight.float().mean().item() == pytest.approx(1 - 400 / 2048, abs=3e-3)
    nearest = torch.ones((), dtype=torch.bfloat16)
    assert (nearest - 1 / 2048).to(torch.bfloat16) == nearest


def test_draws_follow_seed_step_and_name_alone() -> None:
    def after(order: list[int], seed: int = 0) -> Tensor:
        net = nn.Linear(50, 50, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(net.weight)
        steps = Steps(torch.optim.SGD(net.parameters(), lr=1e-3), {"net": net}, seed)
        for step in order:
            torch.rand(7)  # whatever else draws
            net.weight.grad = torch.ones_like(net.weight)
            steps.take(step, OFF)
        return net.weight.detach()

    assert torch.equal(after([0, 1]), after([0, 1]))
    assert not torch.equal(after([0, 1]), after([0, 2])) and not torch.equal(after([0]), after([0], seed=1))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit, torch.optim.Adagrad])
def test_state_comes_back_in_fp32(kind: type[torch.optim.Optimizer]) -> None:
    net, optimizer, steps = made(torch.bfloat16, kind)
    for step in range(4):
        if step == 2:
            middle, (tensors, values) = copy.deepcopy(net.state_dict()), pack_optimizer(optimizer)
        gradients(net, step)
        steps.take(step, OFF)
    again, optimizer, steps = made(torch.bfloat16, kind)
    again.load_state_dict(middle)
    unpack_optimizer(optimizer, {name: tensor.clone() for name, tensor in tensors.items()},
                     json.loads(json.dumps(values)))
    for step in (2, 3):
        gradients(again, step)
        steps.take(step, OFF)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as Prodigy does, under a name that nobody knows."""

    def step(self, closure: Any = None) -> None:  # pyright: ignore
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


def test_optimizers_that_count_over_all_weights_are_refused() -> None:
    net = Net(torch.bfloat16)
    with pytest.raises(UserError, match="Prodigy counts over all weights at once.*take adamw"):
        Steps(prodigyopt.Prodigy(net.parameters()), {"net": net}, 0)
    steps = Steps(Counting(net.parameters(), lr=1e-3), {"net": net}, 0)
    gradients(net, 0)
    with pytest.raises(UserError, match="Counting counts over all weights"):
        steps.take(0, OFF)
    wide = Net(torch.float32)
    steps = Steps(Counting(wide.parameters(), lr=1e-3), {"net": wide}, 0)
    gradients(wide, 0)
    steps.take(0, OFF)
