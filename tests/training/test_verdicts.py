"""What was asked to train and does not is an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from impasto.core.errors import UserError
from impasto.training import run, trainer
from impasto.training.recipe import Recipe
from impasto.training.trainer import train
from impasto.training.verdicts import PATIENCE, Verdicts


def test_a_layer_without_a_gradient_is_named() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    verdicts = Verdicts({"method.0.unet": net})
    verdicts.begin()
    for step in range(PATIENCE):
        net["used"](torch.ones(1, 2)).sum().backward()
        if step < PATIENCE - 1:
            verdicts.gradients(step)
    with pytest.raises(UserError, match="nothing reaches unet.idle: no gradient in the first 5 steps"):
        verdicts.gradients(PATIENCE - 1)


def test_a_layer_that_did_not_change_is_named_and_one_that_did_is_not() -> None:
    net = nn.ModuleDict({"moved": nn.Linear(2, 2), "still": nn.Linear(2, 2)})
    verdicts = Verdicts({"method.0.unet": net})
    verdicts.begin()
    with torch.no_grad():
        net["moved"].weight[0, 1] += 1e-6  # pyright: ignore
    with pytest.raises(UserError, match="unet.still did not change"):
        verdicts.end()
    with torch.no_grad():
        net["still"].bias.copy_(net["still"].bias.flip(0))  # pyright: ignore
    verdicts.end()


def test_clip_skip_leaves_layers_that_cannot_train(recipe: Callable[..., Recipe]) -> None:
    made = recipe(base={"clip_skip": 1}, method={"targets": ["attention", "text-encoder"]}, train={"steps": 8})
    with pytest.raises(UserError, match=r"nothing reaches text_encoder.text_model.encoder.layers.1.*clip_skip"):
        train(made)
    excluded = r"text_model[.]encoder[.]layers[.]1[.]"
    train(recipe("b", base={"clip_skip": 1}, train={"steps": 8},
                 method={"targets": ["attention", "text-encoder"], "exclude": [excluded]}))


def test_the_beginning_survives_a_resume(recipe: Callable[..., Recipe]) -> None:
    """A run that is resumed knows what the weights were when it began, not when it went on."""
    train(recipe(train={"steps": 4}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_update", lambda self, step: 0.0)  # steps that change nothing
        assert train(recipe(train={"steps": 6})).step == 6


def test_a_checkpoint_that_reads_back_otherwise_is_not_saved(recipe: Callable[..., Recipe],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    original = run.save_tensors

    def failing(tensors: dict[str, torch.Tensor], path: Path) -> None:
        original(tensors, path)
        data = bytearray(path.read_bytes())
        data[-5] ^= 4  # one bit, somewhere in a tensor
        path.write_bytes(bytes(data))

    monkeypatch.setattr(run, "save_tensors", failing)
    made = recipe()
    with pytest.raises(UserError, match="reads back as something else.*disk is failing"):
        train(made)
    assert not list((Path(made.output.dir) / "checkpoints").iterdir())


def test_space_is_asked_for_before_a_checkpoint_is_written(recipe: Callable[..., Recipe],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SPARE", 2**60)
    with pytest.raises(UserError, match=r"the checkpoint of step 2 takes \d+ MiB, and \d+ MiB are free"):
        train(recipe())


def test_checkpoints_kept_for_good(recipe: Callable[..., Recipe]) -> None:
    made = recipe(output={"checkpoint_every": 1, "keep": 1, "keep_every": 2})
    train(made)
    assert sorted(p.name for p in (Path(made.output.dir) / "checkpoints").iterdir()) == ["000002", "000004", "000006"]
