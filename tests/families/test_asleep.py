"""Weights that are let go: back before anybody sees one, and the same to the bit."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import save_adapter
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors")


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """All that it holds, without waking it."""
    found = {}
    for path, module in network.named_modules():
        for held in (module._parameters, module._buffers):
            real = getattr(held, "_real", held)
            found |= {f"{path}.{name}": tensor for name, tensor in dict.items(real) if tensor is not None}
    return found


def asleep(network: nn.Module) -> bool:
    return all(tensor.is_meta for name, tensor in tensors(network).items() if not name.endswith("position_ids"))


LOOKS: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda text: text.text_model.final_layer_norm.weight,
    "parameters": lambda text: next(text.parameters()),
    "named parameters": lambda text: list(text.named_parameters()),
    "get_parameter": lambda text: text.get_parameter("text_model.final_layer_norm.bias"),
    "a state dict": lambda text: text.state_dict(),
    "a move": lambda text: text.to("cpu"),
    "a cast": lambda text: text.double().float(),
    "a copy": lambda text: copy.deepcopy(text),
    "the forward": lambda text: text(torch.zeros(1, 77, dtype=torch.long)),
    "a layer's forward": lambda text: text.text_model.encoder.layers[0].mlp(torch.zeros(1, 2, 32)),
    "buffers": lambda text: list(text.buffers()),
    "a dictionary of them": lambda text: dict(text.text_model.final_layer_norm._parameters),
    "a setting": lambda text: text.text_model.final_layer_norm.register_parameter("weight", copy.deepcopy(
        text.text_model.final_layer_norm.weight)),
}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("look", LOOKS)
def test_any_look_brings_all_of_them_back(checkpoint: Path, look: str, quantize: str) -> None:
    base = load_base(checkpoint, quantize_text=quantize)
    text = base.components["text_encoder"]
    before = {name: tensor.clone() for name, tensor in tensors(text).items()}
    base.sleep(["text_encoder"])
    assert asleep(text) and base.numbers("text_encoder") == sum(
        p.numel() for p in load_base(checkpoint, quantize_text=quantize).components["text_encoder"].parameters())
    LOOKS[look](text)
    after = tensors(text)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(type(module._parameters) is dict for module in text.modules())
    base.sleep(["text_encoder"])
    assert asleep(text)


def test_structure_and_configurations_wake_nothing(checkpoint: Path) -> None:
    base = load_base(checkpoint)
    names = ["text_encoder", "vae"]
    base.sleep(names)
    base.targets("all"), base.key_value_layers(), base.cell, base.latent_channels, base.variant, base.native_size
    base.latents(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 4, 4))
    base.stack_text([{"states": torch.zeros(1, 77, 32)}, {"states": torch.zeros(1, 154, 32)}])
    base.checkpoint_gradients(), base.fingerprint(), base.trained(), base.numbers("vae")
    with base.keeping_latent_scale():
        base.set_latent_scale(2.0)
    assert all(asleep(base.components[name]) for name in names)


def test_a_block_wakes_what_it_uses_and_it_sleeps_again(checkpoint: Path) -> None:
    base = load_base(checkpoint)
    text, vae = base.components["text_encoder"], base.components["vae"]
    exact = base.encode_text(["a cat"])["states"]
    base.sleep(["text_encoder", "vae"])
    with base.awake():
        assert torch.equal(base.encode_text(["a cat"])["states"], exact)
        assert not asleep(text) and asleep(vae)
    assert asleep(text) and asleep(vae)


def test_a_checkpoint_that_has_changed_is_not_read_again(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    base = load_base(path)
    base.sleep(["text_encoder"])
    text = base.components["text_encoder"]
    for change in (lambda: path.unlink(), lambda: write_checkpoint(path, seed=1)):
        change()
        with pytest.raises(UserError, match="its text_encoder, which is needed again, is not what it was"):
            base.encode_text(["a cat"])
        assert asleep(text)
    path.write_bytes(checkpoint.read_bytes())
    assert torch.equal(base.encode_text(["a cat"])["states"], load_base(checkpoint).encode_text(["a cat"])["states"])


def test_one_that_changed_before_it_was_to_sleep_stays(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    base = load_base(path)
    base.fingerprint()
    os.replace(write_checkpoint(tmp_path / "other.safetensors", seed=1), path)
    base.sleep(["text_encoder"])
    assert not asleep(base.components["text_encoder"])


def test_what_no_file_holds_stays(checkpoint: Path, tmp_path: Path) -> None:
    merged = tmp_path / "a.safetensors"
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    delta = LowRank.from_factors(torch.ones(32, 1), torch.ones(1, 32))
    save_adapter(Adapter({layer: (delta,)}, family="sd1"), merged)
    bases: list[tuple[Base, str]] = [(load_base(checkpoint, adapters=[str(merged)]), "text_encoder"),
                                     (load_base(checkpoint, init_seed=0), "vae"), (load_base(checkpoint), "unet")]
    next(bases[2][0].components["unet"].parameters()).requires_grad_()
    for base, name in bases:
        base.sleep([name])
        assert not asleep(base.components[name])
    bases[0][0].sleep(["vae"])
    assert asleep(bases[0][0].components["vae"])
