"""What waits elsewhere comes back as it was: equal gradients, weights and states, and nothing is moved for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from impasto.core.errors import UserError
from impasto.deltas.attach import attach
from impasto.deltas.layers import shape_of
from impasto.deltas.lowrank import LowRank
from impasto.families.blocks import blocks_of
from impasto.families.load import load_base
from impasto.training import offload, rounding
from impasto.training.environment import Precision
from impasto.training.frugal import check_here
from impasto.training.offload import Activations, Blocks, States
from impasto.training.processes import Processes
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.rounding import Steps
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.training.conftest import tree
from tests.training.test_fused import assert_equal
from tests.training.test_trainer import losses


class Elsewhere:
    """Stands for another memory: what is sent there is another tensor, and is counted."""

    def __init__(self) -> None:
        self.sent, self.brought = list[Tensor](), 0

    def send(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        self.sent.append(tensor)
        return tensor.clone() if into is None else into.copy_(tensor)

    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.brought += 1
        return tensor.clone()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.q, self.k, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        x = torch.tanh(self.frozen(x))
        if again:
            return self.last(checkpoint(lambda x: torch.tanh(self.q(x) * self.k(x)), x, use_reentrant=False))
        return self.last(torch.tanh(self.q(x) * self.k(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def gradients(made: Net, again: bool = False, **hooks: Any) -> list[Tensor]:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    if hooks:
        with Activations(made.parameters, least=1, **hooks).away():
            y = made(x, again).square().sum()
    else:
        y = made(x, again).square().sum()
    y.backward()
    return [x.grad, *(p.grad for p in made.parameters() if p.grad is not None)]  # pyright: ignore


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_equal_and_weights_stay(again: bool) -> None:
    there, plain, made = Elsewhere(), gradients(net(), again), net()
    away = gradients(made, again, send=there.send, bring=there.bring)
    assert len(plain) == len(away) == 7 and all(torch.equal(a, b) for a, b in zip(plain, away, strict=True))
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    assert there.sent and not weights & {t.untyped_storage().data_ptr() for t in there.sent}
    assert there.brought >= len(there.sent)
    if not again:  # of what both q and k read there is one copy
        assert len({(t.data_ptr(), t._version) for t in there.sent}) == len(there.sent)


def test_small_ones_stay() -> None:
    there, made = Elsewhere(), net()
    with Activations(made.parameters, send=there.send, bring=there.bring).away():
        made(torch.ones(8, 16)).sum().backward()
    assert not there.sent


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)}


@pytest.mark.parametrize("bucket", [1, 300, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_equal_whatever_waits(kind: str, dtype: torch.dtype, bucket: int, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    monkeypatch.setattr(rounding, "BUCKET", bucket)
    there, off = Elsewhere(), torch.amp.GradScaler("cpu", enabled=False)
    plain, away = (net().to(dtype) for _ in range(2))
    optimizers = [OPTIMIZERS[kind]([{"params": list(made.q.parameters())}, {"params": list(made.k.parameters())}])
                  for made in (plain, away)]
    states = States(optimizers[1], send=there.send, bring=there.bring)
    steps = [Steps(optimizers[0], {"net": plain}, 0), Steps(optimizers[1], {"net": away}, 0, states=states)]
    for step in range(3):
        for made, one in ((plain, steps[0]), (away, steps[1])):
            for i, parameter in enumerate((*made.q.parameters(), *made.k.parameters())):
                draw = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype)
            one.take(step, off)
        steps[1].optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), away.parameters(), strict=True))
    assert there.sent and there.brought
    homes = {t.data_ptr() for t in states._homes.values()}
    for entry in optimizers[1].state.values():
        assert all(value.data_ptr() in homes for value in entry.values() if isinstance(value, Tensor))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_is_equal_and_resumes(kind: str, mini: Path, photos: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    there, elsewhere = Elsewhere(), offload.States.__init__.__kwdefaults__
    activations = offload.Activations.__init__.__kwdefaults__
    assert elsewhere is not None and activations is not None

    def made(name: str, **train: Any) -> Recipe:
        plain = tree(mini, photos, tmp_path / name, train=train)
        return make_recipe({**plain, "method": {"kind": kind}})

    both = {"offload": ["activations", "optimizer"], "checkpointing": kind == "full"}
    plain, away, stopped = made("plain"), made("away", **both), made("stopped", **both)
    train(plain)
    for key, value in {"send": there.send, "bring": there.bring}.items():
        monkeypatch.setitem(elsewhere, key, value)
        monkeypatch.setitem(activations, key, value)
    monkeypatch.setitem(activations, "least", 1000)
    train(away)
    assert len(there.sent) > 100
    train(stopped, stop_after=3)
    assert train(stopped).resumed_from == 3
    assert_equal(away, stopped)
    if kind == "lora":
        assert_equal(plain, away)
    assert losses(away.output.dir) == pytest.approx(losses(plain.output.dir), rel=1e-5)


def test_it_goes_with_a_fused_backward(mini: Path, photos: Path, tmp_path: Path) -> None:
    runs = []
    for name, waits in (("plain", []), ("away", ["optimizer", "activations"])):
        plain = tree(mini, photos, tmp_path / name, train={"clip": 0, "fused_backward": True, "offload": waits})
        runs.append(make_recipe({**plain, "method": {"kind": "full"}}))
        train(runs[-1])
    assert_equal(*runs)


@pytest.mark.parametrize(("train", "line"), [
    ({"optimizer": "adamw8bit"}, "bitsandbytes' share their tables: paged_adamw8bit moves its own"),
    ({"optimizer": "bitsandbytes.optim:Adam8bit"}, "bitsandbytes' share their tables"),
    ({"optimizer": "prodigy"}, "prodigy counts over all weights at once"),
    ({"precision": "fp16"}, "fp16 scales the loss"),
    ({"offload": ["states"]}, "train.offload"),
])
def test_what_it_does_not_go_with_is_one_line(train: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        make_recipe({"base": {"path": "x"}, "method": {"kind": "lora"}, "train": {"offload": ["optimizer"], **train}})


def test_fp16_by_itself_is_refused_too() -> None:
    options = make_recipe({"base": {"path": "x"}, "method": {"kind": "lora"}, "train": {"offload": ["optimizer"]}})
    with pytest.raises(UserError, match="fp16 scales the loss"):
        check_here(options.train, Precision(torch.device("cpu"), torch.float16), Processes())


# --- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_blocks_come_for_each_forward_and_go(family: str, quantize: str, tmp_path: Path) -> None:
    """Equal predictions and gradients; of the blocks no more is on the device at once than one."""
    checkpoint = write_checkpoint(tmp_path / "base", family, layout="diffusers")
    there, results = Elsewhere(), []
    for waits in (False, True):
        base = load_base(checkpoint, quantize=quantize)
        for parameter in base.denoiser.parameters():  # of mapped ones the last bits hang on where they begin
            parameter.data = parameter.data.clone()
        base.checkpoint_gradients()
        delta = LowRank.from_factors(torch.ones(*shape_of(base.layer(path := base.targets("attention")[0]))[:1], 1),
                                     torch.ones(1, shape_of(base.layer(path))[1]))
        attach(base.components, {path: delta.requires_grad_()})
        found = list(blocks_of(base.denoiser).values())
        if waits:
            waiting = Blocks(found, torch.device("cpu"), send=there.send, bring=there.bring)
            homes = {tensor.data_ptr() for tensors in waiting._waiting for tensor in tensors}
            assert homes == resident(found) and len(there.sent) == len(homes)
            for block in found:
                block.register_forward_hook(lambda module, args, out, all=found, homes=homes: once(all, homes))
        x = torch.randn(1, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        time = torch.tensor([500]) if family == "sd1" else torch.tensor([0.5])
        y = base.predict(x, time, base.condition(base.encode_text(["a cat"])))
        y.square().sum().backward()
        with torch.no_grad():
            again = base.predict(x, time, base.condition(base.encode_text(["a cat"])))
        results.append([y.detach(), again, x.grad, delta.up.grad, delta.down.grad])
        if waits:
            assert resident(found) == homes
    assert there.brought >= 3 * len(there.sent) * 0.8  # forward, again in the backward, forward
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_the_block_on_its_way_is_the_one_that_comes_next(tmp_path: Path) -> None:
    """A UNet computes down, middle, up, and registers otherwise: from the second pass on none is brought in vain, but
    where the backward begins, and the forward."""
    base = load_base(write_checkpoint(tmp_path / "mini.safetensors"))
    base.denoiser.requires_grad_(False)
    base.checkpoint_gradients()
    there, blocks = Elsewhere(), list(blocks_of(base.denoiser).values())
    Blocks(blocks, torch.device("cpu"), send=there.send, bring=there.bring, ahead=True)
    x = torch.randn(1, base.latent_channels, 8, 8, requires_grad=True)
    condition, before = base.condition(base.encode_text(["a cat"])), 0
    for _ in range(2):
        before = there.brought
        base.predict(x, torch.tensor([500]), condition).square().sum().backward()
    most = max(len([*block.parameters(), *block.buffers()]) for block in blocks)
    assert 2 * len(there.sent) <= there.brought - before <= 2 * len(there.sent) + 2 * most


def resident(blocks: list[nn.Module]) -> set[int]:
    return {tensor.data_ptr() for block in blocks for module in block.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None}


def once(blocks: list[nn.Module], homes: set[int]) -> None:
    """In a block's forward, or right after it: those of one block at most are elsewhere than at home."""
    assert sum(bool(resident([block]) - homes) for block in blocks) <= 1


def test_a_run_with_blocks_away_is_equal(mini: Path, photos: Path, tmp_path: Path) -> None:
    runs = []
    for name, waits in (("plain", []), ("away", ["blocks", "activations", "optimizer"])):
        plain = tree(mini, photos, tmp_path / name, base={"quantize": "int8"},
                     train={"checkpointing": True, "offload": waits},
                     sample={"every": 3, "steps": 2, "prompts": ["sks dog"]})
        runs.append(make_recipe(plain))
        train(runs[-1])
    assert_equal(*runs)
    one, other = ([path.read_bytes() for path in sorted((Path(run.output.dir) / "previews").iterdir())] for run in runs)
    assert one == other and len(one) == 3


@pytest.mark.parametrize(("train", "line"), [
    ({}, "lets a block's weights go after its forward.*say train.checkpointing = true"),
    ({"checkpointing": 0.5}, "say train.checkpointing = true"),
    ({"checkpointing": True, "compile": True}, "leave train.compile out"),
])
def test_what_blocks_away_do_not_go_with_is_one_line(train: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        make_recipe({"base": {"path": "x"}, "method": {"kind": "lora"}, "train": {"offload": ["blocks"], **train}})
