"""diffusers' and peft's formats against those libraries: each reads what the other writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.header import read_header
from tests.formats.adapter_cases import (
    TEXT_LAYERS,
    UNET_LAYERS,
    dense,
    mini_text_encoder,
    mini_unet,
    patched,
    random_adapter,
    text_output,
    unet_output,
    worst,
)
from tests.formats.test_kohya import pipeline

DIFFUSERS_BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def config(component: str, **options) -> peft.LoraConfig:
    """Ranks and alphas that differ by pattern, as peft's users write them."""
    layers = UNET_LAYERS if component == "unet" else [t.removeprefix("text_model.") for t in TEXT_LAYERS]
    patterns = {
        "unet": {"rank_pattern": {"attn1.to_q": 2, r"conv\d": 6},
                 "alpha_pattern": {"to_k": 7, "^conv_in": 2}},
        "text_encoder": {"rank_pattern": {"mlp.fc1": 5}, "alpha_pattern": {"self_attn.q_proj": 1}},
    }
    return peft.LoraConfig(r=4, lora_alpha=3, target_modules=list(layers), init_lora_weights=False,
                           **patterns[component], **options)


def tuners(module: nn.Module) -> Iterator[tuple[str, peft.tuners.lora.LoraLayer]]:
    for name, layer in module.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            yield name.removeprefix("base_model.model."), layer


def peft_dense(component: str, module: nn.Module) -> dict[str, Tensor]:
    """dW of each layer as peft computes it itself."""
    found = {}
    for name, layer in tuners(module):
        whole = name if component == "unet" or name.startswith("text_") else f"text_model.{name}"
        found[f"{component}.{whole}"] = layer.get_delta_weight("default").detach().double()
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("metadata", [False, True])
def test_files_that_diffusers_writes(tmp_path: Path, rslora: bool, metadata: bool) -> None:
    torch.manual_seed(0)
    unet, encoder = mini_unet(), mini_text_encoder()
    options = {"use_rslora": rslora} if metadata else {}
    configs = {name: config(name, **options) for name in ("unet", "text_encoder")}
    if not metadata:  # such a file says nothing of alpha: its reader takes it for the rank
        for each in configs.values():
            each.lora_alpha, each.alpha_pattern, each.rank_pattern = 4, {}, {}
    unet.add_adapter(configs["unet"])
    peft.inject_adapter_in_model(configs["text_encoder"], encoder)
    encoder.peft_config = {"default": configs["text_encoder"]}
    plain = {name: each.to_dict() for name, each in configs.items()}
    for each in plain.values():
        each["target_modules"] = sorted(each["target_modules"])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(unet),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(encoder),
        unet_lora_adapter_metadata=plain["unet"] if metadata else None,
        text_encoder_lora_adapter_metadata=plain["text_encoder"] if metadata else None)
    loaded = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert worst(dense(loaded), peft_dense("unet", unet) | peft_dense("text_encoder", encoder)) < 1e-6


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21, transformers 5.24
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("rslora", [False, True])
def test_folders_that_peft_writes(tmp_path: Path, component: str, rslora: bool) -> None:
    torch.manual_seed(0)
    module = mini_unet() if component == "unet" else mini_text_encoder()
    model = peft.get_peft_model(module, config(component, use_rslora=rslora))
    model.save_pretrained(tmp_path / "a")
    assert worst(dense(load_adapter(tmp_path / "a")), peft_dense(component, model)) < 1e-6


@pytest.mark.parametrize("alpha", [None, 1.0, 3.0])
def test_diffusers_loads_it(tmp_path: Path, alpha: float | None) -> None:
    adapter = random_adapter(alpha=alpha)
    save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers", dtype=torch.float32)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    want = unet_output(patched(mini_unet(), "unet", dense(adapter)))
    torch.testing.assert_close(unet_output(pipe.unet), want, rtol=1e-4, atol=1e-5)
    want = text_output(patched(mini_text_encoder(), "text_encoder", dense(adapter)))
    torch.testing.assert_close(text_output(pipe.text_encoder), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_peft_loads_it(tmp_path: Path, alpha: float | None) -> None:
    adapter = random_adapter(alpha=alpha)
    save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["text_encoder", "unet"]
    unet = peft.PeftModel.from_pretrained(mini_unet(), str(tmp_path / "a" / "unet"))
    want = {k: v for k, v in dense(adapter).items() if k.startswith("unet.")}
    assert worst(peft_dense("unet", unet), want) < 1e-6


def test_one_component_is_one_folder(tmp_path: Path) -> None:
    adapter = random_adapter(text=False)
    save_adapter(adapter, tmp_path / "a", format="peft", dtype=torch.float32)
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert worst(dense(load_adapter(tmp_path / "a")), dense(adapter)) < 1e-6
    with pytest.raises(UserError, match="exists already"):
        save_adapter(adapter, tmp_path / "a", format="peft")


@pytest.mark.parametrize("alpha", [1.0, 0.5, 64.0])
def test_a_power_of_two_is_in_the_factors(tmp_path: Path, alpha: float) -> None:
    """alpha = rank in the config, so that a reader of the tensors alone applies the same strength."""
    adapter = random_adapter(alpha=alpha)
    adapter = replace(adapter, deltas={k: v for k, v in adapter.deltas.items() if v[0].rank in (1, 2, 4)})
    save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers")
    header = read_header(tmp_path / "a.safetensors")
    said = json.loads(header.metadata["lora_adapter_metadata"])
    for component in ("unet", "text_encoder"):
        assert said[f"{component}.lora_alpha"] == said[f"{component}.r"]
        assert said[f"{component}.alpha_pattern"] == said[f"{component}.rank_pattern"]
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for layer, want in dense(adapter).items():
        a, b = (tensors[f"{layer}.lora_{x}.weight"].double() for x in "AB")
        got = (b.flatten(1) @ a.flatten(1)).reshape(want.shape)
        assert float((got - want).norm() / want.norm()) < 1e-3


OLD = [
    ("{b}.attn1.processor.to_q_lora.{f}.weight", "{b}.attn1.to_q"),
    ("{b}.attn2.processor.to_out_lora.{f}.weight", "{b}.attn2.to_out.0"),
    ("{b}.attn1.to_q.lora.{f}.weight", "{b}.attn1.to_q"),
    ("{b}.ff.net.0.proj.lora.{f}.weight", "{b}.ff.net.0.proj"),
    ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.{f}.weight",
     "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"),
    ("text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.{f}.weight",
     "text_encoder.text_model.encoder.layers.3.self_attn.out_proj"),
    ("text_encoder.encoder.layers.3.mlp.fc1.lora_linear_layer.{f}.weight",
     "text_encoder.text_model.encoder.layers.3.mlp.fc1"),
    ("{bare}.attn1.processor.to_k_lora.{f}.weight", "{b}.attn1.to_k"),
    ("unet.base_model.model.{bare}.attn1.to_v.lora_{F}.default.weight", "{b}.attn1.to_v"),
    ("base_model.model.{b}.attn1.to_v.lora_{F}.weight", "{b}.attn1.to_v"),
]


@pytest.mark.parametrize(("key", "layer"), OLD)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_older_spellings(tmp_path: Path, key: str, layer: str, alpha: float | None) -> None:
    names = {"b": DIFFUSERS_BLOCK, "bare": DIFFUSERS_BLOCK.removeprefix("unet.")}
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 3, generator=draw), torch.randn(3, 5, generator=draw)
    tensors = {key.format(f="up", F="B", **names): up, key.format(f="down", F="A", **names): down}
    if alpha is not None:
        tensors[layer.format(**names) + ".alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    ((got, delta),) = dense(load_adapter(tmp_path / "a.safetensors")).items()
    assert got == layer.format(**names)
    torch.testing.assert_close(delta, (1 if alpha is None else 2) * (up.double() @ down.double()))


def peft_folder(folder: Path, **changes) -> Path:
    save_adapter(random_adapter(text=False, alpha=3.0), folder, format="peft")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("changes", "said"), [
    ({"peft_type": "OFT"}, "OFT"), ({"use_dora": True}, "lacks its magnitude.*use_dora"),
    ({"lora_alpha": "3"}, "alpha '3'"),
    ({"lora_alpha": True}, "alpha 'True'"), ({"lora_alpha": 10**400}, "alpha '1000"),
    ({"alpha_pattern": [1]}, "alpha_pattern"),
    ({"alpha_pattern": {"(": 1}}, "regular expression"), ({"alpha_pattern": {"(a*)*b": 1}}, "intricate"),
    ({"alpha_pattern": {".*": float("nan")}}, "nan"),
])
def test_bad_configs(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(peft_folder(tmp_path / "a", **changes))
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    for text in ("{", "[]", "{" * 5000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="not a table in JSON"):
            load_adapter(folder)
