"""Steps inside the backward: the same weights to the bit, and no two gradients together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from impasto.core.errors import UserError
from impasto.training.environment import Precision
from impasto.training.frugal import check_here
from impasto.training.fused import FusedBackward
from impasto.training.processes import Processes
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.rounding import Steps
from impasto.training.trainer import train
from tests.training.conftest import tree

FULL: dict[str, Any] = {"kind": "full", "parts": ["unet", "text-encoder"]}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"train": {"ema": 0.9, "schedule": "cosine", "warmup": 2, "rates": {"unet[.]mid_block": 1e-4}},
              "method": {"text_encoder_learning_rate": 1e-4}},
    "checkpointing": {"train": {"checkpointing": True}},
    "sgd": {"train": {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}, "learning_rate": 1e-2}},
    "adafactor": {"train": {"optimizer": "adafactor"}},
    "muon": {"train": {"optimizer": "muon"}, "method": {"parts": ["attention"]}},
    "8 bits": {"train": {"optimizer": "adamw8bit"}, "method": {"parts": ["attention"]}},
    "bf16 weights": {"train": {"precision": "bf16", "ema": 0.9}, "method": {"weights": "bf16"}},
    "bf16 computation": {"train": {"precision": "bf16"}},
}


def made(recipe: Callable[..., Recipe], name: str, fused: bool, kind: str = "adamw", **train: Any) -> Recipe:
    own = KINDS[kind]
    return recipe(name, method={**FULL, **own.get("method", {})},
                  train={"clip": 0, "fused_backward": fused, **own.get("train", {}), **train})


@pytest.fixture
def recipe(mini: Path, photos: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """As the fixture of that name, without a LoRA's rank."""
    def of(name: str, **sections: Any) -> Recipe:
        return make_recipe({**tree(mini, photos, tmp_path / name, **sections), "method": sections["method"]})

    return of


def state(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.output.dir) / "checkpoints" / "000006" / "state.safetensors")


def assert_equal(a: Recipe, b: Recipe) -> None:
    one, other = state(a), state(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_weights_averages_and_states_are_those_of_plain_steps(recipe: Callable[..., Recipe], kind: str) -> None:
    plain, fused = (made(recipe, str(fused), fused, kind) for fused in (False, True))
    outcomes = [train(one) for one in (plain, fused)]
    assert_equal(plain, fused)
    assert outcomes[0].loss == outcomes[1].loss


@pytest.mark.parametrize("kind", ["adamw", "bf16 weights"])
def test_a_stopped_run_ends_as_one_that_was_not(recipe: Callable[..., Recipe], kind: str) -> None:
    straight, stopped = made(recipe, "straight", True, kind), made(recipe, "stopped", True, kind)
    train(straight)
    train(stopped, stop_after=3)
    assert train(stopped).resumed_from == 3
    assert_equal(straight, stopped)


def test_no_two_gradients_are_there_together() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    steps, together = Steps(optimizer, {"net": net}, 0, apart=True), []
    one = steps.one

    def watched(parameter: nn.Parameter, step: int) -> None:
        together.append(sum(p.grad is not None for p in net.parameters()))
        one(parameter, step)

    steps.one = watched
    fused = FusedBackward(steps, net.parameters())
    reference = [p.detach().clone().requires_grad_() for p in net.parameters()]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), reference, strict=True)), x).sum().backward()
    fused.begin(0)
    net(x).sum().backward()
    assert together == [1] * 10 and all(p.grad is None for p in net.parameters())
    grads = [p.grad for p in reference if p.grad is not None]
    assert len(fused.had()) == 10
    torch.testing.assert_close(fused.norm(), torch.cat([g.flatten() for g in grads]).norm())
    for parameter, before in zip(net.parameters(), reference, strict=True):
        assert before.grad is not None
        torch.testing.assert_close(parameter.detach(), before.detach() - 0.1 * before.grad)


def test_what_rests_stays() -> None:
    net = nn.Linear(4, 4)
    fused = FusedBackward(Steps(torch.optim.SGD(net.parameters(), lr=0.1), {"net": net}, 0), net.parameters())
    before = net.bias.detach().clone()
    fused.begin(0, [net.bias])
    net(torch.ones(1, 4)).sum().backward()
    assert torch.equal(net.bias.detach(), before) and net.bias.grad is None


def test_a_loss_that_is_no_number_changes_nothing(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    from impasto.training import trainer

    seen = list[torch.Tensor]()
    step_losses, error = trainer.step_losses, trainer.not_finite

    def bad(*args: Any) -> torch.Tensor:
        losses = step_losses(*args)
        return losses * torch.nan if args[3].step == 2 else losses

    monkeypatch.setattr(trainer, "step_losses", bad)
    monkeypatch.setattr(trainer.Verdicts, "gradients", lambda self, step, had: seen.append(torch.tensor(step)))
    monkeypatch.setattr(trainer, "not_finite", lambda *args: seen.append(torch.tensor(-1)) or error(*args))
    with pytest.raises(UserError, match="the loss is not finite at step 3"):
        train(made(recipe, "a", True))
    assert [int(one) for one in seen] == [0, 1, -1]


@pytest.mark.parametrize(("sections", "line"), [
    ({"method": {"kind": "lora"}}, "saves the gradients of whole networks, and lora's are small"),
    ({"train": {"accumulation": 2}}, "train.accumulation adds up several"),
    ({"prior": {"caption": "a dog"}}, "class pictures .* have a backward of their own"),
    ({"train": {"clip": 1.0}}, "say train.clip = 0"),
    ({"train": {"precision": "fp16"}}, "fp16 scales the loss"),
    ({"train": {"optimizer": "prodigy"}}, "prodigy counts over all weights at once"),
    ({"train": {"optimizer": "schedulefree_adamw"}}, "schedulefree_adamw counts over all weights at once"),
])
def test_what_it_does_not_go_with_is_one_line(sections: dict[str, Any], line: str) -> None:
    plain: dict[str, Any] = {"base": {"path": "x"}, "method": {"kind": "full"},
                             "train": {"clip": 0, "fused_backward": True}}
    for section, keys in sections.items():
        plain[section] = {**plain.get(section, {}), **keys}
    with pytest.raises(UserError, match=line) as raised:
        make_recipe(plain)
    assert "\n" not in str(raised.value)


def test_what_this_machine_cannot_is_one_line() -> None:
    options = make_recipe({"base": {"path": "x"}, "method": {"kind": "full"},
                           "train": {"clip": 0, "fused_backward": True}}).train
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="added up over all processes"):
        check_here(options, Precision(cpu, torch.float32), Processes(0, 2))
    with pytest.raises(UserError, match="fp16 scales the loss"):
        check_here(options, Precision(cpu, torch.float16), Processes())
    prodigyopt, net = pytest.importorskip("prodigyopt"), nn.Linear(2, 2)
    with pytest.raises(UserError, match="Prodigy counts over all weights at once"):
        Steps(prodigyopt.Prodigy(net.parameters()), {"net": net}, 0, apart=True)
