"""Optimizers: each in the list equals its library used directly, resumes bit for bit, and says what it cannot do."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from impasto.core.errors import MissingExtra, UserError
from impasto.core.progress import Reporter
from impasto.formats.adapters import load_adapter
from impasto.training.environment import Precision, choose_device
from impasto.training.optimizer_state import pack_optimizer, unpack_optimizer
from impasto.training.optimizers import OPTIMIZERS, effective_rate, make_optimizer, remarks
from impasto.training.rates import rate_factor, set_rates
from impasto.training.recipe import Recipe
from impasto.training.run import Run
from impasto.training.sections import TrainOptions
from impasto.training.trainer import Trainer, train
from tests.heard import Heard

CPU = torch.device("cpu")


def options(name: str = "adamw", **keys: Any) -> TrainOptions:
    entry = OPTIMIZERS.get(name)
    if entry is not None:
        pytest.importorskip(entry.path.partition(":")[0])
    return TrainOptions.model_validate({"optimizer": name, **keys})


def network(device: torch.device = CPU) -> nn.Module:
    """Small, but with a matrix of more than 4096 weights, where 8-bit states begin, and a zero one, as in a LoRA."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8))
    nn.init.zeros_(model[4].weight)
    return model.to(device)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range, rate: Callable[[int], float]) -> None:
    device = next(model.parameters()).device
    for i in which:
        set_rates(optimizer, rate(i))
        optimizer.zero_grad()
        inputs = torch.sin(torch.arange(2 * 2 * 36.0) * (1 + i)).view(2, 2, 6, 6).to(device)
        (model(inputs) - 1).square().sum().backward()
        optimizer.step()


def over(model: nn.Module, made: TrainOptions, *, two: bool = False) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2], "lr": 1e-3}, {"params": parameters[2:], "lr": None}] if two else \
        [{"params": parameters, "lr": None}]
    return make_optimizer(groups, made, next(model.parameters()).device)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- each in the list -----------------------------------------------------------------------------------------------


def direct(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The library used as its documents say, with what we recommend written out."""
    import bitsandbytes
    import dadaptation
    import prodigyopt
    import schedulefree
    import transformers

    from impasto.training.muon import Muon

    adamw: dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    lion: dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.05)
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(parameters, fused=True, **adamw),
        "adamw8bit": lambda: bitsandbytes.optim.AdamW8bit(parameters, **adamw),
        "paged_adamw8bit": lambda: bitsandbytes.optim.AdamW8bit(parameters, **adamw),  # what it is without a GPU
        "muon": lambda: Muon([{"params": parameters}], **adamw),
        "lion": lambda: bitsandbytes.optim.Lion(parameters, **lion),
        "lion8bit": lambda: bitsandbytes.optim.Lion8bit(parameters, **lion),
        "adafactor": lambda: transformers.Adafactor(parameters, lr=0.01, scale_parameter=False, relative_step=False),
        "prodigy": lambda: prodigyopt.Prodigy(parameters, lr=0.01, weight_decay=0.01, use_bias_correction=True,
                                              safeguard_warmup=True),
        "dadapt_adam": lambda: dadaptation.DAdaptAdam(parameters, lr=0.01, weight_decay=0.01, decouple=True),
        "dadapt_lion": lambda: dadaptation.DAdaptLion(parameters, lr=0.01, weight_decay=0.01),
        "schedulefree_adamw": lambda: schedulefree.AdamWScheduleFree(parameters, **adamw),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.01),
    }
    assert made.keys() == OPTIMIZERS.keys()
    optimizer = made[name]()
    if name == "schedulefree_adamw":
        optimizer.train()  # pyright: ignore
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_library_used_directly(name: str) -> None:
    made = options(name, learning_rate=0.01)
    ours, theirs, start = network(), network(), network()
    steps(ours, over(ours, made), range(5), lambda i: 1.0)
    steps(theirs, direct(name, list(theirs.parameters())), range(5), lambda i: 1.0)
    assert_equal(ours, theirs)
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), start.parameters(), strict=True))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "torch.optim:RAdam", "torch.optim:Adafactor", "torch.optim:ASGD",
                                  "schedulefree:RAdamScheduleFree", "bitsandbytes.optim:AdEMAMix8bit"])
def test_it_comes_back_from_a_checkpoint_bit_for_bit(name: str) -> None:
    """Taken apart, through JSON and safetensors' types, after a warm-up's first step of rate 0."""
    rate = 1.0 if name in OPTIMIZERS and OPTIMIZERS[name].adaptive else 0.01
    made = options(name, learning_rate=rate, warmup=2, schedule="cosine")
    two = rate != 1.0

    def factor(i: int) -> float:
        return rate_factor(i, 9, made)

    straight, broken = network(), network()
    steps(straight, over(straight, made, two=two), range(8), factor)
    optimizer = over(broken, made, two=two)
    for first, last in ((0, 3), (3, 6)):
        steps(broken, optimizer, range(first, last), factor)
        tensors, values = pack_optimizer(optimizer)
        assert any(t.dtype == torch.uint8 for t in tensors.values()) == ("8bit" in name)
        again = network()
        again.load_state_dict(broken.state_dict())
        broken, optimizer = again, over(again, made, two=two)
        unpack_optimizer(optimizer, tensors, json.loads(json.dumps(values)))
        assert pack_optimizer(optimizer)[1] == values
    steps(broken, optimizer, range(6, 8), factor)
    assert_equal(straight, broken)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_at_a_rate_of_its_kind(name: str) -> None:
    made = options(name, learning_rate=1.0 if OPTIMIZERS[name].adaptive else 3e-3)
    model = network()
    inputs = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    optimizer, losses = over(model, made), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append((model(inputs) - 1).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.extra])
def test_a_missing_library_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, entry = options(name), OPTIMIZERS[name]
    package = entry.path.partition(":")[0].partition(".")[0]
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    line = f"needs the package {package}; pip install 'impasto[{entry.extra}]'"
    with pytest.raises(MissingExtra, match=re.escape(line)):
        make_optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": None}], made, CPU)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (need,) = project["optional-dependencies"][entry.extra]
    assert re.fullmatch(rf"{package}>=[\d.]+,<[\d.]+", need) and need in project["optional-dependencies"]["dev"]


def test_adamw_follows_its_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    made = TrainOptions(learning_rate=0.1, weight_decay=0.02, betas=(0.8, 0.95), eps=1e-6)
    optimizer = make_optimizer([{"params": [weight], "lr": None}], made, CPU)
    w, m, v = weight.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for t in range(1, 6):
        factor = rate_factor(t - 1, 5, made)
        set_rates(optimizer, factor)
        weight.grad = torch.tensor([0.5 * t, -1.0 / t], dtype=torch.float64)
        g, lr = weight.grad.clone(), 0.1 * factor
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g  # Loshchilov & Hutter 2019, Algorithm 2
        w = w - lr * 0.02 * w - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        torch.testing.assert_close(weight.detach(), w, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_paged_state_is_paged_again_after_a_checkpoint() -> None:
    made, device = options("paged_adamw8bit", learning_rate=1e-3), torch.device("cuda")

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(512, 512).to(device)
        return layer, over(layer, made)

    def go(layer: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for i in which:
            optimizer.zero_grad()
            layer(torch.full((2, 512), 0.1 * i, device=device)).square().sum().backward()
            optimizer.step()

    (straight, first), (broken, second) = build(), build()
    go(straight, first, range(6))
    go(broken, second, range(3))
    tensors, values = pack_optimizer(second)
    again, third = build()
    again.load_state_dict(broken.state_dict())
    unpack_optimizer(third, tensors, values)
    assert third.state[again.weight]["state1"].is_paged
    go(again, third, range(3, 6))
    assert_equal(straight, again)


# --- options and import paths ---------------------------------------------------------------------------------------


def test_groups_keep_their_own_rates() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([{"params": [a], "lr": None}, {"params": [b], "lr": 5e-6}],
                               TrainOptions(learning_rate=1e-4), CPU)
    set_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 2.5e-6]


def test_options_are_passed_on() -> None:
    made = options("sgd", learning_rate=0.01, weight_decay=0.1, optimizer_options={"momentum": 0.9, "nesterov": True})
    ours, theirs = network(), network()
    steps(ours, over(ours, made), range(5), lambda i: 1.0)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True)
    optimizer.param_groups[0]["base_lr"] = 0.01
    steps(theirs, optimizer, range(5), lambda i: 1.0)
    assert_equal(ours, theirs)


def test_any_class_goes_by_its_import_path() -> None:
    made = options("torch.optim:NAdam", learning_rate=0.01, betas=[0.8, 0.9],
                   optimizer_options={"momentum_decay": 0.01})
    ours, theirs = network(), network()
    steps(ours, over(ours, made), range(5), lambda i: 1.0)
    optimizer = torch.optim.NAdam(theirs.parameters(), lr=0.01, betas=(0.8, 0.9), momentum_decay=0.01)
    optimizer.param_groups[0]["base_lr"] = 0.01
    steps(theirs, optimizer, range(5), lambda i: 1.0)
    assert_equal(ours, theirs)


class Forgetful(torch.optim.SGD):
    """Counts its steps where no checkpoint finds them."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1 / self.count)


class Listing(torch.optim.SGD):
    """Keeps what JSON does not hold."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["kept"] = [torch.zeros(1)]


@pytest.mark.parametrize(("name", "keys", "line"), [
    ("adamw", {"amsgard": True}, "adamw takes no 'amsgard'; did you mean 'amsgrad'. it takes: .*fused"),
    ("sgd", {"zzz": 1}, "sgd takes no 'zzz'; it takes: .*momentum"),
    ("adamw", {"lr": 1e-3}, "the rate is train.learning_rate; leave lr out"),
    ("adafactor", {"relative_step": True}, "adafactor refuses its options .Cannot combine manual"),
    ("sgd", {"momentum": -1}, "sgd refuses its options .Invalid momentum value"),
    ("torch.optim:RAdam", {"zzz": 1}, "torch.optim:RAdam takes no 'zzz'"),
    ("no_such_package.part:Thing", {}, "no_such_package.part cannot be imported .*; install the package"),
    ("torch.optim:Adamm", {}, "torch.optim:Adamm is no optimizer class"),
    ("pathlib:Path", {}, "pathlib:Path is no optimizer class"),
    ("torch.optim:LBFGS", {}, "does not go through a trial .*closure"),
    ("schedulefree:AdamWScheduleFreePaper", {}, "trains at other weights than it answers for"),
    (f"{__name__}:Forgetful", {}, "does not come back from a checkpoint bit for bit"),
    (f"{__name__}:Listing", {}, "does not go through a trial of four steps and a checkpoint .*JSON"),
])
def test_what_cannot_be_is_one_line(name: str, keys: dict[str, Any], line: str) -> None:
    made = options(name, optimizer_options=keys)
    with pytest.raises(UserError, match=line) as raised:
        make_optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": None}], made, CPU)
    assert "\n" not in str(raised.value)


def test_a_shared_key_that_the_class_has_not_is_named() -> None:
    with pytest.raises(UserError, match="train.betas: torch.optim:Rprop takes no 'betas'"):
        make_optimizer([], options("torch.optim:Rprop", betas=[0.9, 0.99]), CPU)


# --- those that find their rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.adaptive])
def test_a_rate_that_is_found_is_one_for_all_and_wants_a_factor_of_one(name: str, capsys: Any) -> None:
    model = network()
    optimizer = over(model, options(name))
    assert remarks(options(name), optimizer) == [] and optimizer.param_groups[0]["lr"] == 1.0
    steps(model, optimizer, range(5), lambda i: 1.0)
    assert effective_rate(optimizer) == optimizer.param_groups[0]["d"] > 0
    wrong = options(name, learning_rate=1e-4, schedule="cosine_with_restarts")
    rate, schedule = remarks(wrong, over(model, wrong))
    assert "train.learning_rate = 1 is" in rate and "cosine_with_restarts" in schedule
    with pytest.raises(UserError, match=r"takes one for all that is trained, not 0.001 and 1;"):
        over(model, options(name), two=True)
    assert capsys.readouterr().out == ""  # the libraries print


def test_advice_is_for_what_is_set_otherwise() -> None:
    model = network()
    assert remarks(options(), over(model, options())) == []
    made = options("schedulefree_adamw", schedule="cosine")
    assert remarks(made, over(model, made)) == [
        "schedulefree_adamw is not made for train.schedule = cosine: constant is its authors' advice"]
    made = options("torch.optim:RAdam", schedule="cosine")
    assert remarks(made, over(model, made)) == [] and effective_rate(over(model, made)) == 1e-4


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ema"), [("prodigy", 0.0), ("schedulefree_adamw", 0.0), ("schedulefree_adamw", 0.5)])
def test_a_run_that_was_stopped_ends_bit_equal(recipe: Callable[..., Recipe], name: str, ema: float) -> None:
    keys: dict[str, Any] = {"optimizer": options(name).optimizer, "learning_rate": 1.0 if name == "prodigy" else 0.01,
                            "ema": ema, "warmup": 2}
    sample, output = {"every": 2, "steps": 1, "prompts": ["a dog"]}, {"dtype": "fp32", "save_every": 2}
    straight = recipe("straight", train=keys, output=output)  # and shows nothing on its way
    broken = recipe("broken", train={**keys, "steps": 3}, sample=sample, output=output)
    train(straight)
    train(broken)
    longer = recipe("broken", train=keys, sample=sample, output=output)
    assert train(longer).resumed_from == 3
    for file in ("dog.safetensors", "dog-000004.safetensors", "checkpoints/000006/state.safetensors"):
        a, b = (load_file(Path(made.output.dir) / file) for made in (straight, longer))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_artifact_of_a_schedule_free_run_is_what_it_answers_for(recipe: Callable[..., Recipe]) -> None:
    made = recipe(train={"optimizer": options("schedulefree_adamw").optimizer, "learning_rate": 0.01},
                  output={"dtype": "fp32"})
    with Run.open(Path(made.output.dir), "dog") as run:
        trainer = Trainer(made, run, Reporter())
        artifact = trainer.train().artifact
        live = trainer.methods[0].adapter()
        trainer.optimizer.eval()  # pyright: ignore
        theirs = trainer.methods[0].adapter()
    assert artifact is not None and live is not None and theirs is not None
    saved = load_adapter(artifact)
    for layer in saved.deltas:
        torch.testing.assert_close(saved.dense(layer), theirs.dense(layer), rtol=0, atol=1e-6)
    assert max((saved.dense(layer) - live.dense(layer)).abs().max() for layer in saved.deltas) > 1e-4


def test_a_run_says_at_once_what_is_missing_and_warns(recipe: Callable[..., Recipe],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    train(recipe(train={"optimizer": options("prodigy").optimizer, "learning_rate": 0.1, "steps": 1}), heard)
    assert heard.warnings and "train.learning_rate = 1" in heard.warnings[0]
    monkeypatch.setattr("impasto.training.trainer.load_base", lambda *a, **k: pytest.fail("the base is loaded"))
    with pytest.raises(UserError, match="adamw takes no 'zzz'"):
        train(recipe("other", train={"optimizer_options": {"zzz": 1}}))


def test_rates_by_path_reach_the_optimizer(recipe: Callable[..., Recipe]) -> None:
    made = recipe(train={"optimizer": "sgd", "learning_rate": 1.0, "rates": {"down_blocks": 1e-30}, "clip": 0.0},
                  output={"dtype": "fp32"})
    train(made)
    ups = {key: tensor for key, tensor in load_file(Path(made.output.dir) / "dog.safetensors").items()
           if key.endswith("lora_up.weight")}
    rested = {key for key, tensor in ups.items() if tensor.abs().max() < 1e-20}
    assert rested and rested == {key for key in ups if "down_blocks" in key} and rested != ups.keys()


def test_precision_and_device_say_what_cannot_be() -> None:
    with pytest.raises(UserError, match="fp16 training needs a CUDA device"):
        Precision.choose("fp16", torch.device("cpu"))
    assert Precision.choose("auto", torch.device("cpu")).dtype == torch.float32
    with pytest.raises(UserError, match="device 'gpu' cannot be used"):
        choose_device("gpu")
