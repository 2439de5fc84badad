"""LoRA on a miniature Stable Diffusion 1.x: trained, saved, loaded, applied, merged: the same predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from impasto.families.apply import apply
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.families.merged import merge_into
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.methods.lora import LoRA
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors")


def predict(base: Base) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = base.encode_text(["a photo of sks dog", "a cat"])
    return base.predict(latents, torch.tensor([100, 700]), base.condition(text))


def train(base: Base, method: LoRA, steps: int = 3) -> None:
    groups = method.prepare(base, 0)
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=1e-2)
    for _ in range(steps):
        predict(base).square().mean().backward()
        assert all(d.up.grad is not None and d.up.grad.any() for d in method.deltas.values())  # each part is trained
        optimizer.step()
        optimizer.zero_grad()


def test_from_training_to_another_base_and_into_its_weights(mini: Path, tmp_path: Path) -> None:
    base = load_base(mini)
    names = {name: list(module.state_dict()) for name, module in base.components.items()}
    before = predict(base)
    method = LoRA(LoRA.Options(targets=["all", "text-encoder"], rank=4, ranks={"convolutions": 2}))
    assert method.trains(base) == {"unet", "text_encoder"}
    train(base, method)
    trained = predict(base).detach()
    assert {name: list(module.state_dict()) for name, module in base.components.items()} == names
    tolerance = dict(rtol=1e-5, atol=1e-5 * float(trained.abs().max()))
    assert float((trained - before).norm() / before.norm()) > 0.01

    save_adapter(method.adapter(), tmp_path / "dog.safetensors", dtype=torch.float32)
    other = load_base(mini)
    attachment = apply(other, load_adapter(tmp_path / "dog.safetensors"))
    assert_close(predict(other), trained, **tolerance)
    attachment.enabled = False
    assert torch.equal(predict(other), before)
    attachment.detach()
    merge_into(other, [str(tmp_path / "dog.safetensors")])
    assert_close(predict(other), trained, **tolerance)


def test_gradient_checkpointing_gives_the_same_gradients(mini: Path) -> None:
    found = []
    for checkpointing in (False, True):
        base = load_base(mini)
        method = LoRA(LoRA.Options(targets=["attention", "text-encoder"], rank=4))
        groups = method.prepare(base, 0)
        if checkpointing:
            base.checkpoint_gradients()
        predict(base).square().mean().backward()
        found.append([p.grad for group in groups for p in group["params"]])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
