"""peft's folders of LoHa, LoKr and DoRA, and diffusers' file of DoRA, against those libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.dora import Dora
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.programs import of_file
from tests.formats.adapter_cases import (
    TEXT_LAYERS,
    UNET_LAYERS,
    mini_text_encoder,
    mini_unet,
    text_output,
    unet_output,
)
from tests.formats.kind_cases import adapter_of_kind, output_with
from tests.formats.test_kohya import pipeline

# peft 0.21, transformers 5.24
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "dora": (peft.LoraConfig, {"r": 3, "lora_alpha": 2, "use_dora": True}),
    "dora-rslora": (peft.LoraConfig, {"r": 3, "lora_alpha": 2, "use_dora": True, "use_rslora": True}),
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 2}),
    "loha-tucker": (peft.LoHaConfig, {"r": 3, "alpha": 2, "use_effective_conv2d": True}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 3}),
    "lokr-both": (peft.LoKrConfig, {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 8}),
    "lokr-tucker": (peft.LoKrConfig, {"r": 1, "alpha": 3, "use_effective_conv2d": True}),
    "lokr-full": (peft.LoKrConfig, {"r": 32, "alpha": 3}),
}


def network(component: str) -> nn.Module:
    return mini_unet() if component == "unet" else mini_text_encoder()


def output(component: str, module: nn.Module) -> Tensor:
    return unet_output(module) if component == "unet" else text_output(module)


def layers(component: str) -> list[str]:
    return list(UNET_LAYERS) if component == "unet" else [t.removeprefix("text_model.") for t in TEXT_LAYERS]


def trained(component: str, name: str) -> nn.Module:
    """peft's model, its parameters moved from where they begin."""
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    patterns = {"alpha_pattern": {"to_k": 7} if component == "unet" else {"mlp.fc1": 5}}
    module = network(component).requires_grad_(True)
    model = peft.get_peft_model(module, kind(target_modules=layers(component), **patterns | options)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes(tmp_path: Path, component: str, name: str) -> None:
    model = trained(component, name)
    model.save_pretrained(str(tmp_path / "a"))
    want = output(component, model.get_base_model())
    assert (want - output(component, network(component))).abs().max() > 5e-3
    loaded = load_adapter(tmp_path / "a")
    got = output_with(loaded, component, lambda module: output(component, module))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("kind", ["dora", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-full", "lokr-tucker",
                                  "lora-tucker"])
def test_peft_loads_it(tmp_path: Path, component: str, kind: str) -> None:
    adapter = adapter_of_kind(kind)
    save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)
    file = tmp_path / "a" / component / "adapter_model.safetensors"
    if component == "text_encoder":  # for a version of transformers with text_model. in its paths; this one has none
        safetensors.torch.save_file({key.replace("text_model.", ""): tensor
                                     for key, tensor in safetensors.torch.load_file(file).items()}, file)
    model = peft.PeftModel.from_pretrained(network(component), str(file.parent)).eval()
    want = output_with(adapter, component, lambda module: output(component, module))
    torch.testing.assert_close(output(component, model.get_base_model()), want, rtol=1e-4, atol=1e-5)


def test_diffusers_loads_dora(tmp_path: Path) -> None:
    adapter = adapter_of_kind("dora")
    save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers", dtype=torch.float32)
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(unet_output(pipe.unet), output_with(adapter, "unet", unet_output), rtol=1e-4, atol=1e-5)
    # transformers 5.24 takes the magnitudes' names for others; when this fails, delete the caution in formats.programs
    assert (text_output(pipe.text_encoder) - output_with(adapter, "text_encoder", text_output)).abs().max() > 1e-2
    (verdict,) = (v for v in of_file(tmp_path / "a.safetensors") if v.program == "diffusers")
    assert verdict.loaded == verdict.total and "text encoder" in verdict.caution


def test_what_diffusers_writes_of_dora(tmp_path: Path) -> None:
    module = mini_unet()
    module.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, use_dora=True, target_modules=list(UNET_LAYERS)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tensors: dict[str, Any] = peft.get_peft_model_state_dict(module)
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=tensors)
    loaded = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {term.kind for terms in loaded.deltas.values() for term in terms} == {"dora"}
    torch.testing.assert_close(output_with(loaded, "unet", unet_output), unet_output(module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("format", "dora", "said"), [
    ("peft", True, "a LoRA with a Tucker core under DoRA, which a peft file"),
    ("diffusers", True, "a LoRA with a Tucker core under DoRA, which a diffusers file"),
    ("diffusers", False, "a LoRA with a Tucker core, which a diffusers file"),
])
def test_a_core_that_no_file_holds_is_named(tmp_path: Path, format: str, dora: bool, said: str) -> None:
    core = LowRank((4, 4, 3, 3), 40, tucker=True)  # larger as two factors than the matrix
    term = Dora(core, torch.ones(4, 1, 1, 1)) if dora else core
    adapter = Adapter({"unet.conv_out": (term,)}, family="sd1")
    with pytest.raises(UserError, match=f"unet.conv_out holds {said} cannot hold; save it as kohya"):
        save_adapter(adapter, tmp_path / "a.safetensors", format=format)


@pytest.mark.parametrize(("changes", "said"), [
    ({"r": "2"}, "the rank '2'"), ({"r": 0}, "the rank '0'"), ({"alpha": None}, "the alpha 'None'"),
    ({"rank_pattern": [1]}, "rank_pattern in its config"), ({"rank_pattern": {"(": 1}}, "regular expression"),
])
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save_adapter(adapter_of_kind("lokr-full", text=False), tmp_path / "a", format="peft")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(tmp_path / "a")
    assert "\n" not in str(caught.value)
