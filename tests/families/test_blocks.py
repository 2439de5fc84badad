"""Blocks computed again: which, and that nothing changes but memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto.families.base import Base
from impasto.families.blocks import blocks_of, largest_first
from impasto.families.load import load_base
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_checkpoint(folder / family, family, layout="diffusers") for family in ("sd1", "sd3")}


def computed(base: Base) -> tuple[list[Tensor], int, int]:
    """Gradients of the input and of all weights; bytes kept for the backward, and forwards of blocks."""
    calls = [0]
    for block in blocks_of(base.denoiser).values():
        block.register_forward_pre_hook(lambda module, args: calls.__setitem__(0, calls[0] + 1))
    parameters = list(base.denoiser.requires_grad_().parameters())
    x = torch.randn(1, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    time = torch.tensor([500]) if base.family == "sd1" else torch.tensor([0.5])
    with torch.no_grad():
        condition = base.condition(base.encode_text(["a cat"]))
    kept: dict[int, Tensor] = {}  # by where they begin; alive, so that no other begins there

    def pack(tensor: Tensor) -> Tensor:
        if tensor.nbytes > getattr(kept.get(tensor.data_ptr()), "nbytes", 0):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = base.predict(x, time, condition)
    mine = {parameter.data_ptr() for parameter in parameters}
    size = sum(tensor.nbytes for at, tensor in kept.items() if at not in mine)
    y.square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in parameters)]
    return [grad for grad in grads if grad is not None], size, calls[0]


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_a_share_is_computed_again_and_nothing_else_changes(family: str, bases: dict[str, Path]) -> None:
    base = load_base(bases[family])
    exact, most, calls = computed(base)
    count = len(blocks_of(base.denoiser))
    assert calls == count and len(exact) > 20
    last = most
    for share in (0.25, 0.5, 1.0):
        base = load_base(bases[family])
        base.checkpoint_gradients(share)
        found, kept, again = computed(base)
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
        if share < 1:
            assert again == count + math.ceil(share * count)
        assert kept < last
        last = kept


def test_the_highest_resolution_comes_first(bases: dict[str, Path]) -> None:
    base: Any = load_base(bases["sd1"])
    unet = base.denoiser
    order = largest_first(unet)
    top = set(blocks_of(unet.down_blocks[0]).values()) | set(blocks_of(unet.up_blocks[-1]).values())
    assert set(order[:len(top)]) == top
    middle = set(blocks_of(unet.mid_block).values())
    assert set(order[-len(middle):]) == middle
