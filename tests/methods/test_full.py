"""Full fine-tuning: what trains is what is named, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

from impasto.core.errors import UserError
from impasto.core.rng import Draws
from impasto.families.load import load_base
from impasto.methods.full import Full
from impasto.objectives.batch import Batch
from impasto.objectives.denoise import Denoise, DenoiseOptions
from tests.checkpoints import write_checkpoint
from tests.families.conftest import random_sd1


def full(**options: Any) -> Full:
    return Full(Full.Options.model_validate({"kind": "full", **options}))


@pytest.mark.parametrize(("parts", "exclude", "start"), [
    (["unet"], [], ("unet.",)), (["text-encoder"], [], ("text_encoder.",)), (["vae"], [], ("vae.",)),
    (["vae-decoder"], [], ("vae.decoder.", "vae.post_quant_conv.")), (["vae-decoder", "vae"], [], ("vae.",)),
    (["text-encoder", "unet"], [], ("unet.", "text_encoder.")),
    (["unet"], ["down_blocks", "mid-block", "up_blocks"], ("unet.conv_", "unet.time_embedding.")),
    (["conv_in", "unet.conv_in.weight", r"^unet\.conv_in"], [], ("unet.conv_in.",)),  # named thrice, trained once
    (["unet", "text-encoder"], ["unet", "text_encoder.text_model.e"], ("text_encoder.text_model.final",)),
])
def test_what_is_named_trains_and_nothing_else(parts: list[str], exclude: list[str], start: tuple[str, ...]) -> None:
    base, method = random_sd1(), full(parts=parts, exclude=exclude)
    trains = method.trains(base)
    groups = method.prepare(base, seed=0)
    parameters = {f"{name}.{path}": parameter for name, network in base.components.items()
                  for path, parameter in network.named_parameters()}
    expected = [path for path in parameters if path.startswith(start)]
    assert trains == {path.split(".")[0] for path in expected}
    assert sorted(path for group in groups for path in group["paths"]) == sorted(expected)  # each once
    assert all(parameters[path] is parameter for group in groups
               for path, parameter in zip(group["paths"], group["params"], strict=True))
    assert [path for path, parameter in parameters.items() if parameter.requires_grad] == expected
    kept = [f"{name}.{path}" for name, module in method.modules().items() for path in module.state_dict()]
    assert sorted(kept) == sorted(expected)  # what a checkpoint holds


def test_a_selection_loads_into_the_network() -> None:
    base, other = random_sd1(), random_sd1()
    method = full(parts=["norms", "keys-values"])
    method.prepare(base, seed=0)
    (selection,) = method.modules().values()
    state = {path: torch.randn_like(tensor) for path, tensor in selection.state_dict().items()}
    selection.load_state_dict(state)
    for path, tensor in base.denoiser.state_dict().items():
        assert torch.equal(tensor, state[path] if path in state else other.denoiser.state_dict()[path])
    with pytest.raises(RuntimeError, match="Missing key"):
        selection.load_state_dict(dict(list(state.items())[1:]))


def test_trained_weights_are_fp32_with_the_files_own_values(tmp_path: Path) -> None:
    """Whatever the base computes in, and the frozen ones stay in that; norms take fp32 together."""
    file = write_checkpoint(tmp_path / "base.safetensors")
    whole, base = load_base(file), load_base(file, dtype=torch.bfloat16)
    full(parts=["keys-values", "text-encoder"]).prepare(base, seed=0)
    for name in ("unet", "text_encoder"):
        for path, parameter in base.components[name].named_parameters():
            wide = parameter.requires_grad or "norm" in path
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), path
            if wide:
                assert torch.equal(parameter, whole.components[name].get_parameter(path)), path


@pytest.mark.parametrize("parts", [["norms"], ["biases"], [r"norm.*weight"], ["position_embedding"], ["unet"],
                                   ["time_embedding", "attention"], [r"^text_encoder.*\.bias"]])
def test_fp32_weights_compute_in_a_bf16_base(parts: list[str]) -> None:
    base, wide = random_sd1(), random_sd1()
    for name in ("unet", "text_encoder"):
        for parameter in base.components[name].parameters():
            parameter.data = parameter.data.bfloat16()
    batch = Batch(samples=[0], names=["a"], weight=torch.ones(1), captions=["a cat"], moments=torch.zeros(1, 8, 8, 8))
    losses = []
    for each, kind in ((base, torch.bfloat16), (wide, None)):
        method = full(parts=parts)
        method.prepare(each, seed=0)
        with torch.autocast("cpu", kind, enabled=kind is not None):
            loss = Denoise(DenoiseOptions.model_validate({})).loss(each, batch, Draws(0, 0, batch.samples)).mean()
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32
                   for parameter in each.trained().values())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_what_cannot_be_trained_is_one_line() -> None:
    with pytest.raises(pydantic.ValidationError, match="Attempting to unscale FP16 gradients"):
        full(weights="fp16")
    with pytest.raises(UserError, match="bf16 weights need a computation in bf16.*precision=bf16"):
        full(weights="bf16").prepare(random_sd1(), seed=0)
    with pytest.raises(UserError, match="the VAE computes in fp32 always"):
        full(weights="bf16", parts=["vae-decoder"]).prepare(random_sd1(), seed=0)
    with pytest.raises(UserError, match="'keys-value' names no weight.*did you mean 'keys-values'"):
        full(parts=["keys-value"]).prepare(random_sd1(), seed=0)
    with pytest.raises(UserError, match="exclude: 'vae' names no weight that is trained"):
        full(exclude=["vae"]).prepare(random_sd1(), seed=0)
    with pytest.raises(UserError, match="no weight is left to train"):
        full(parts=["norms"], exclude=["unet"]).prepare(random_sd1(), seed=0)


def test_the_text_encoder_has_its_own_rate() -> None:
    groups = full(parts=["unet", "text-encoder"], text_encoder_learning_rate=1e-6).prepare(random_sd1(), seed=0)
    assert [group["lr"] for group in groups] == [None, 1e-6]
    with pytest.raises(UserError, match="no text encoder is trained"):
        full(text_encoder_learning_rate=1e-6).prepare(random_sd1(), seed=0)
