"""Building networks without memory and filling them; what is wrong with a file is told in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from impasto.core.errors import UserError
from impasto.families.networks import build, fill, random_init
from tests.checkpoints import KINDS, component_configs

CONFIGS = component_configs("sd1", "mini")


@pytest.mark.parametrize("component", CONFIGS)
def test_filled_is_what_it_was_filled_with(component: str) -> None:
    one = random_init(component, KINDS[component], CONFIGS[component], seed=1)
    other = build(KINDS[component], CONFIGS[component])
    assert all(p.is_meta for p in other.parameters())
    assert fill(other, [*one.state_dict().items(), ("surplus.weight", torch.zeros(1))]) == ["surplus.weight"]
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not any(b.is_meta for b in other.buffers())


def test_weights_are_taken_not_copied() -> None:
    tensors = random_init("vae", "AutoencoderKL", CONFIGS["vae"]).state_dict()
    vae = build("AutoencoderKL", CONFIGS["vae"])
    fill(vae, tensors.items())
    assert all(p.data_ptr() == tensors[name].data_ptr() for name, p in vae.named_parameters())
    half = build("AutoencoderKL", CONFIGS["vae"])
    fill(half, tensors.items(), dtype=torch.float16)
    assert all(p.dtype == torch.float16 and not p.requires_grad for p in half.parameters())


def test_text_encoders_paths_are_those_of_files() -> None:
    encoder = build("CLIPTextModel", CONFIGS["text_encoder"])
    assert all(name.startswith("text_model.") for name in encoder.state_dict())
    assert isinstance(encoder.get_submodule("text_model.encoder.layers.1.mlp.fc1"), nn.Linear)


def test_random_init_is_a_function_of_its_seed() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (random_init("vae", "AutoencoderKL", CONFIGS["vae"], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_errors() -> None:
    tensors = dict(random_init("vae", "AutoencoderKL", CONFIGS["vae"]).state_dict())
    last = list(tensors)[-1]

    def filled(changed: dict[str, torch.Tensor]) -> None:
        fill(build("AutoencoderKL", CONFIGS["vae"]), changed.items(), where="x.safetensors")

    with pytest.raises(UserError, match=f"x.safetensors: tensor '{last}' is missing"):
        filled({name: t for name, t in tensors.items() if name != last})
    with pytest.raises(UserError, match="tensors are missing: .* and [0-9]+ more"):
        filled({})
    with pytest.raises(UserError, match=f"'{last}' is 7×2, the network wants 4"):
        filled(tensors | {last: torch.zeros(7, 2)})
    with pytest.raises(UserError, match="not of floating point"):
        filled(tensors | {last: tensors[last].long()})
    with pytest.raises(UserError, match="describes no network"):
        build("UNet2DConditionModel", {**CONFIGS["unet"], "down_block_types": ["NoSuchBlock"]})
    with pytest.raises(UserError, match="describes no network"):
        build("CLIPTextModel", {**CONFIGS["text_encoder"], "num_attention_heads": 5})
