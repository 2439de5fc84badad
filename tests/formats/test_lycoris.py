"""kohya's format against LyCORIS' own library: each reads what the other writes, to the same outputs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from impasto.deltas.attach import attach
from impasto.formats.adapters import load_adapter, save_adapter
from tests.formats.adapter_cases import mini_text_encoder, mini_unet, text_output, unet_output
from tests.formats.kind_cases import adapter_of_kind, output_with

lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed", exc_type=ImportError)

TUCKER = {"use_tucker": True}
DORA = {"dora_wd": True}
NETWORKS: dict[str, dict[str, Any]] = {
    "locon": {}, "locon-tucker": TUCKER, "locon-dora": DORA, "locon-dora-in": DORA | {"wd_on_output": False},
    "locon-tucker-dora": TUCKER | DORA,
    "loha": {}, "loha-tucker": TUCKER, "loha-dora": DORA,
    "lokr": {"factor": 4}, "lokr-both": {"decompose_both": True, "linear_dim": 1}, "lokr-full": {"full_matrix": True},
    "lokr-tucker": TUCKER | {"conv_dim": 1}, "lokr-dora": {"factor": 4} | DORA,
    "full": {}, "full-norms": {"train_norm": True},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def trained(module: nn.Module, name: str) -> Any:
    """A network of LyCORIS on the module, its parameters moved from where they begin."""
    options = {"linear_dim": 2, "linear_alpha": 1.5, "conv_dim": 2, "conv_alpha": 3} | NETWORKS[name]
    torch.manual_seed(0)
    network = lycoris.create_lycoris(module, 1.0, algo=name.partition("-")[0], **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def kohyas(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The names as LyCORIS' module for kohya's scripts has them."""
    return {name.replace("lycoris_", prefix, 1).replace("lora_te_encoder", "lora_te_text_model_encoder"): tensor
            for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_what_lycoris_writes(tmp_path: Path, name: str, prefix: str) -> None:
    module = mini_unet()
    plain = unet_output(module)
    network = trained(module, name)
    want = unet_output(module)
    assert (want - plain).abs().max() > 0.05
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}
    safetensors.torch.save_file(kohyas(tensors, prefix), tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    torch.testing.assert_close(output_with(loaded, "unet", unet_output), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["locon", "loha-dora", "lokr", "full-norms"])
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_te_"])
def test_what_lycoris_writes_of_a_text_encoder(tmp_path: Path, name: str, prefix: str) -> None:
    module = mini_text_encoder()
    network = trained(module, name)
    want = text_output(module)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}
    safetensors.torch.save_file(kohyas(tensors, prefix), tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert all(layer.startswith("text_encoder.text_model.") for layer in loaded.deltas)
    torch.testing.assert_close(output_with(loaded, "text_encoder", text_output), want, rtol=1e-4, atol=1e-5)


# its loader splits LoKr layers anew, by sides that it takes from the factors: with a kernel it takes these wrongly; and
# it takes DoRA's axis for the outputs'
@pytest.mark.parametrize("kind", ["lora", "lora-tucker", "loha", "loha-tucker", "lokr", "lokr-full", "dense", "dora",
                                  "dora-loha", "dora-lokr"])
def test_lycoris_loads_it(tmp_path: Path, kind: str) -> None:
    adapter = adapter_of_kind(kind, text=False, norms=kind == "dense")
    if "lokr" in kind:
        adapter.deltas = {path: terms for path, terms in adapter.deltas.items() if len(terms[0].shape) == 2}
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    tensors = {key.replace("lora_unet_", "lycoris_"): tensor
               for key, tensor in safetensors.torch.load_file(tmp_path / "a.safetensors").items()}
    module = mini_unet()
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, "", module, tensors)
        network.apply_to()
        got = unet_output(module)
    plain = {"unet": mini_unet()}
    with attach(plain, adapter.deltas):
        torch.testing.assert_close(got, unet_output(plain["unet"]), rtol=1e-4, atol=1e-5)
