"""Hypernetworks from the recipe to the file, on a miniature Stable Diffusion 1.x whose contexts are 32 and 64 wide."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.hypernetwork import Hypernetwork as Hook
from impasto.families.apply import apply, notices
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.methods.base import Method
from impasto.methods.hypernetwork import Hypernetwork
from impasto.methods.lora import LoRA
from tests.checkpoints import write_checkpoint
from tests.heard import Heard


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors")


def hypernetwork(**options: Any) -> Hypernetwork:
    return Hypernetwork(Hypernetwork.Options(**options))


def predict(base: Base) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = base.encode_text(["a photo of sks dog", "a cat"])
    return base.predict(latents, torch.tensor([100, 700]), base.condition(text))


def train(base: Base, *methods: Method, steps: int = 3, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([{"params": group["params"]} for method in methods
                                   for group in method.prepare(base, 0)], lr=lr)
    for _ in range(steps):
        predict(base).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_by_default_it_begins_at_the_base_with_all_its_widths(mini: Path) -> None:
    base = load_base(mini)
    before, method = predict(base), hypernetwork()
    assert method.trains(base) == {"unet"}
    (group,) = method.prepare(base, 0)
    assert torch.equal(predict(base), before)
    assert method.hook.widths == (32, 64)
    assert group["paths"][0] == "hypernetwork.32.k.0.weight" and len(group["paths"]) == len(group["params"]) == 16
    assert all(p.requires_grad and p.dtype == torch.float32 for p in group["params"])
    predict(base).square().mean().backward()
    assert all(network[-1].weight.grad.any() for _, _, network in method.hook.networks())


def test_a1111_s_beginning_is_another(mini: Path) -> None:
    base = load_base(mini)
    before = predict(base)
    hypernetwork(initialisation="normal").prepare(base, 0)
    assert not torch.equal(predict(base), before)


def test_keys_and_values_are_those_of_every_attention(mini: Path) -> None:
    """By the network's own classes, not by names."""
    base = load_base(mini)
    attentions = {path: module for path, module in base.denoiser.named_modules()
                  if type(module).__name__ == "Attention"}
    assert base.key_value_layers() == [
        (f"unet.{path}.to_k", f"unet.{path}.to_v", module.to_k.in_features) for path, module in attentions.items()]
    assert {width for *_, width in base.key_value_layers()} == {32, 64}


def test_the_unet_computes_what_the_formula_says(mini: Path) -> None:
    """Against to_k and to_v replaced by modules that do it themselves; the text's width alone, self-attention too."""

    class Through(nn.Module):
        def __init__(self, change: Any, layer: nn.Module) -> None:
            super().__init__()
            self.change, self.layer = change, layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.change(x))

    base, other = load_base(mini), load_base(mini)
    method = hypernetwork(initialisation="kaiming_normal", activation="swish", layer_norm=True, widths=[32])
    method.prepare(base, 0)
    pair = method.hook.pairs["32"]
    for module in list(other.denoiser.modules()):
        if type(module).__name__ == "Attention" and module.to_k.in_features == 32:
            module.to_k, module.to_v = Through(pair["k"], module.to_k), Through(pair["v"], module.to_v)
    assert_close(predict(base), predict(other), rtol=1e-5, atol=1e-5)


def test_from_training_into_a_file_and_onto_another_base(mini: Path, tmp_path: Path) -> None:
    base = load_base(mini)
    before, method = predict(base), hypernetwork(activation="relu", structure=[1, 2, 2, 1])
    train(base, method)
    trained = predict(base).detach()
    assert float((trained - before).norm() / before.norm()) > 1e-3
    adapter = replace(method.adapter(), base=base.fingerprint())
    save_adapter(adapter, tmp_path / "dog.pt", format="hypernetwork", dtype=torch.float32)
    other, loaded = load_base(mini), load_adapter(tmp_path / "dog.pt", "sd1")
    heard = Heard()
    with apply(other, loaded, report=heard) as applied:
        assert_close(predict(other), trained, rtol=1e-5, atol=1e-5)
        applied.enabled = False
        assert torch.equal(predict(other), before)
        applied.enabled = True
        assert_close(predict(other), trained, rtol=1e-5, atol=1e-5)
    assert torch.equal(predict(other), before) and not heard.notes
    with apply(other, loaded, 0.0):
        assert torch.equal(predict(other), before)
    assert notices(other, replace(loaded, base={"unet": "0" * 32})) == [
        "the adapter was made on another checkpoint of sd1 (unet)"]


@torch.no_grad()
def test_strength_scales_the_change_of_the_input(mini: Path) -> None:
    base = load_base(mini)
    hook = Hook([32, 64])
    before = predict(base)
    changes = []
    for strength in (1e-3, 2e-3):
        with apply(base, Adapter({}, hooks=(hook,)), strength):
            changes.append(predict(base) - before)
    assert_close(changes[1], 2 * changes[0], rtol=0.05, atol=float(changes[0].abs().max()) * 0.05)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_beside_a_lora_in_one_run(mini: Path, tmp_path: Path, order: tuple[int, int]) -> None:
    """The LoRA on to_k sees what the hypernetwork made, whichever was prepared first; their files give it back."""
    base = load_base(mini)
    methods: list[Method] = [hypernetwork(), LoRA(LoRA.Options(targets=["cross-attention"], rank=2))]
    methods = [methods[i] for i in order]
    train(base, *methods)
    trained = predict(base).detach()
    both = functools.reduce(operator.add, [method.adapter() for method in methods])
    assert both.deltas and len(both.hooks) == 1
    other = load_base(mini)
    with apply(other, both):
        assert_close(predict(other), trained, rtol=1e-5, atol=1e-5)
    from impasto.formats.arrangement import save_arranged

    paths = save_arranged(both, tmp_path / "dog.safetensors", dtype=torch.float32)
    with apply(other, load_adapter(paths[0])), apply(other, load_adapter(paths[1])):
        assert_close(predict(other), trained, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_repeats_the_dropout(mini: Path) -> None:
    found = []
    for checkpointing in (False, True):
        base = load_base(mini)
        (group,) = hypernetwork(dropout=0.5, initialisation="xavier_normal").prepare(base, 0)
        if checkpointing:
            base.checkpoint_gradients()
        torch.manual_seed(1)
        predict(base).square().mean().backward()
        found.append([p.grad for p in group["params"]])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_initial_values_are_a_function_of_seed_and_place(mini: Path) -> None:
    made = [hypernetwork(widths=widths) for widths in ([32], [32, 64], [32])]
    for seed, method in zip((0, 0, 1), made, strict=True):
        method.prepare(load_base(mini), seed)
    one, two, three = ([*method.hook.pairs["32"].parameters()] for method in made)
    assert all(map(torch.equal, one, two)) and not torch.equal(one[0], three[0])
    assert not torch.equal(one[0], one[4])  # keys and values begin otherwise


# --- what cannot be ----------------------------------------------------------------------------------------


def test_a_width_that_the_model_lacks(mini: Path) -> None:
    base = load_base(mini)
    with pytest.raises(UserError, match="context of width 768, 999.*it has 32, 64"):
        hypernetwork(widths=[32, 768, 999]).check(base)
    before = predict(base)
    for widths in ([999], [32, 999], [768]):
        with pytest.raises(UserError, match=f"contexts of width {widths[-1]}, which this base does not have.*32, 64"):
            apply(base, Adapter({}, hooks=(Hook(widths),)))
    assert torch.equal(predict(base), before)


def test_a_part_for_another_family_s_text_is_told_of(mini: Path) -> None:
    base, heard = load_base(mini), Heard()
    with apply(base, Adapter({}, hooks=(Hook([32, 64, 1024]),)), report=heard):
        pass
    assert heard.notes == ["the hypernetwork's part for contexts of width 1024 is not used by this base"]


@pytest.mark.parametrize("options, message", [
    ({"structure": [1, 2]}, "structure"), ({"structure": [1, 0.01, 1]}, "structure"),
    ({"activation": "relu", "activate_output": True}, "zero_last cannot begin")])
def test_options_that_do_not_go_together_are_told_before_pictures_are_encoded(mini: Path, options: dict[str, Any],
                                                                              message: str) -> None:
    with pytest.raises(UserError, match=message):
        hypernetwork(**options).check(load_base(mini))
