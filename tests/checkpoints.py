"""Checkpoints with random weights, in the field's formats, to test on: real ones cannot be shipped.

The networks are diffusers' and transformers' own, so a file has just the tensors that a real one has. `mini`
has the real thing's structure with few channels, `real` has its sizes (SD 1: 4.3 GB in float32).

    python -m tests.checkpoints --family sd1 --size mini --layout ldm --seed 0 -o mini.safetensors
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from impasto.families.tokenizer import write_tokenizer
from impasto.formats.configs import CONFIGS, FamilyConfig, Part
from impasto.formats.header import dtype_name, header_bytes

_UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
_VAE: dict[str, Any] = {
    "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64}
#: heads of 64, as these have
_BIG: dict[str, Any] = {"hidden_size": 128, "projection_dim": 128, "intermediate_size": 192, "num_hidden_layers": 2,
                        "num_attention_heads": 2}
#: family -> component -> what differs from the real thing
MINI: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": _UNET | {"cross_attention_dim": 32, "attention_head_dim": 4},
        "text_encoder": {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 64,
                         "num_hidden_layers": 2, "num_attention_heads": 4},
        "vae": _VAE,
    },
    "sd2": {
        "unet": _UNET | {"cross_attention_dim": 128, "attention_head_dim": [2, 4]},
        "text_encoder": _BIG, "vae": _VAE,
    },
    "sdxl": {
        "unet": _UNET | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2], "cross_attention_dim": 160, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 48},
        "text_encoder": {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 64,
                         "num_hidden_layers": 2, "num_attention_heads": 4},
        "text_encoder_2": _BIG | {"projection_dim": 48}, "vae": _VAE,
    },
    "sdxl-refiner": {
        "unet": _UNET | {
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [2, 4, 4],
            "transformer_layers_per_block": 2, "cross_attention_dim": 128, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 5 * 8 + 48},
        "text_encoder_2": _BIG | {"projection_dim": 48}, "vae": _VAE,
    },
    "sd3": {
        "transformer": {
            "sample_size": 8, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 176, "caption_projection_dim": 16, "pooled_projection_dim": 32 + 128,
            "pos_embed_max_size": 12},
        "text_encoder": {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 64,
                         "num_hidden_layers": 2, "num_attention_heads": 4},
        "text_encoder_2": _BIG,
        "text_encoder_3": {"vocab_size": 128, "d_model": 176, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "vae": _VAE,
    },
}
#: of 3.5 medium: norms of queries and keys, and a second attention in the first blocks
SD35 = {"transformer": {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]}}
#: family -> what its single files have to tell beside their weights
TOLD = {"sd2": {"modelspec.prediction_type": "epsilon"}}
#: classes, where none is told
KINDS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
#: variant -> input channels of the UNet
CHANNELS = {"": 4, "instruct-pix2pix": 8, "inpainting": 9}


def component_configs(family: str = "sd1", size: str = "mini", variant: str = "", without: Sequence[str] = (),
                      changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """The configuration of each component of the checkpoint that `write_checkpoint` writes."""
    table: FamilyConfig = CONFIGS.get(family)
    configs = {name: copy.deepcopy(part.config) for name, part in table.parts.items()}
    for own in (MINI[family] if size == "mini" else {}, changes or {}):
        for name, changed in own.items():
            configs[name].update(copy.deepcopy(dict(changed)))
    if "unet" in configs:
        configs["unet"]["in_channels"] = CHANNELS[variant]
    return {name: config for name, config in configs.items() if name not in without}


def build(component: str, config: dict[str, Any], seed: int = 0, kind: str = "") -> nn.Module:
    """The library's own network with its own initial weights, drawn from `seed`. Leaves torch's generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match kind or KINDS[component]:
            case "UNet2DConditionModel":
                network = UNet2DConditionModel.from_config(config)
            case "AutoencoderKL":
                network = AutoencoderKL.from_config(config)
            case "CLIPTextModelWithProjection":
                network = CLIPTextModelWithProjection(CLIPTextConfig(**config))
            case "SD3Transformer2DModel":
                network = SD3Transformer2DModel.from_config(config)
            case "T5EncoderModel":
                network = T5EncoderModel(T5Config(**config))
            case _:
                network = CLIPTextModel(CLIPTextConfig(**config))
        assert isinstance(network, nn.Module)
        return network.eval().requires_grad_(False)


def built(family: str, component: str, config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A family's network, with what the family has of it besides: identities."""
    part = CONFIGS.get(family).parts[component]
    network = build(component, config, seed, part.classes[0])
    for entry in part.entries(config):
        if entry.how == "identity":
            torch.nn.init.eye_(network.get_parameter(entry.name))
    return network


def spelled(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights under the names that files have (transformers from 5.6 omits `text_model.`)."""
    prefix = "text_model." if isinstance(network, CLIPTextModel) and not hasattr(network, "text_model") else ""
    return {prefix + name: tensor for name, tensor in network.state_dict().items()
            if not name.endswith(("position_ids", "encoder.embed_tokens.weight"))}


def write_checkpoint(path: Path | str, family: str = "sd1", size: str = "mini", layout: str = "ldm", seed: int = 0,
                     dtype: torch.dtype = torch.float32, variant: str = "", without: Sequence[str] = (),
                     changes: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write a checkpoint with random weights at `path`, a file (`ldm`) or a folder (`diffusers`).

    An LDM file whose name ends in .ckpt is a pickle, with such things beside the weights as Lightning leaves.
    `variant`: "inpainting" or "instruct-pix2pix", else a plain one. `without`: components left out. `changes`: of the
    components' configurations.
    """
    path = Path(path)
    configs = component_configs(family, size, variant, without, changes)
    if layout == "diffusers":
        return _write_folder(path, family, configs, seed, dtype, variant)
    assert layout == "ldm", layout
    if path.suffix == ".ckpt":
        return _write_pickle(path, family, configs, seed, dtype)
    shapes = {}
    for name in configs:
        part = CONFIGS.get(family).parts[name]
        for entry in (*part.entries(configs[name]), *part.extras(configs[name])):
            if getattr(entry, "how", "") != "identity":
                shapes[part.prefix + entry.ldm] = (dtype_name(dtype), getattr(entry, "ldm_shape", entry.shape))
    told = {"impasto.config": untold(family, configs), "format": "pt", **TOLD.get(family, {})}
    head, order = header_bytes(shapes, told)
    with open(path, "wb") as file:
        file.write(head)
        written = []
        # by prefix, as the header is ordered: one network in memory at a time
        for key, tensor in _ldm_tensors(family, configs, seed, dtype):
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written.append(key)
    assert written == order
    return path


def write_large(path: Path, family: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a single file of real size at the disk's speed: numbers of a normal distribution over and over, by 0.02.

    Its networks need no memory to be made.
    """
    block = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    parts = CONFIGS.get(family).parts
    shapes = {part.prefix + entry.ldm: getattr(entry, "ldm_shape", entry.shape)
              for part in parts.values() for entry in (*part.entries(part.config), *part.extras(part.config))}
    layout = {key: (dtype_name(dtype), shape) for key, shape in shapes.items()}
    head, order = header_bytes(layout, {"format": "pt", **TOLD.get(family, {})})
    with open(path, "wb") as file:
        file.write(head)
        for key in order:
            left = math.prod(shapes[key])
            while left:
                some = block[:min(left, len(block))]
                file.write(some.view(torch.uint8).numpy().data)
                left -= len(some)
    return path


def untold(family: str, configs: dict[str, dict[str, Any]]) -> str:
    """The metadata `impasto.config` of a single file: what its shapes do not tell."""
    return json.dumps({name: {key: configs[name][key] for key in part.untold}
                       for name, part in CONFIGS.get(family).parts.items() if name in configs})


def _ldm_tensors(family: str, configs: dict[str, dict[str, Any]], seed: int, dtype: torch.dtype
                 ) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of an LDM file, sorted by key."""
    parts = {name: CONFIGS.get(family).parts[name] for name in configs}
    for name, part in sorted(parts.items(), key=lambda item: item[1].prefix):
        weights = as_ldm(part, configs[name], spelled(built(family, name, configs[name], seed)))
        for key in sorted(weights):
            yield key, weights[key].to(dtype)


def as_ldm(part: Part, config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights as a single file has them."""
    left, held = dict(weights), dict[str, list[Tensor]]()
    for entry in sorted(part.entries(config), key=lambda entry: (entry.ldm, entry.piece)):
        tensor = left.pop(entry.name)
        if entry.how == "identity":
            continue
        if entry.how == "turned":
            tensor = tensor.T
        elif entry.how == "halves":
            tensor = torch.cat([tensor[len(tensor) // 2:], tensor[:len(tensor) // 2]])
        held.setdefault(entry.ldm, []).append(tensor.reshape(-1, *entry.ldm_shape[1:]))
    assert not left, list(left)
    for extra in part.extras(config):
        held[extra.ldm] = held[extra.like] if extra.like else [torch.full(extra.shape, extra.value)]
    return {part.prefix + key: torch.cat(tensors) if tensors[0].ndim else tensors[0] for key, tensors in held.items()}


def _write_pickle(path: Path, family: str, configs: dict[str, dict[str, Any]], seed: int, dtype: torch.dtype
                  ) -> Path:
    weights = dict(_ldm_tensors(family, configs, seed, dtype))
    torch.save({"epoch": 0, "global_step": 1, "state_dict": weights, "impasto.config": untold(family, configs),
                **TOLD.get(family, {})}, path)
    return path


def _write_folder(path: Path, family: str, configs: dict[str, dict[str, Any]], seed: int, dtype: torch.dtype,
                  variant: str) -> Path:
    """As diffusers and transformers themselves write it."""
    table: FamilyConfig = CONFIGS.get(family)
    path.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "_class_name": table.pipelines[variant],
        "_diffusers_version": "0.30.0", **table.index,
        "scheduler": ["diffusers", table.scheduler["_class_name"]],
        **{name: ["transformers", words.classes[0]] for name, words in table.tokenizers.items()
           if words.component in configs},
    }
    for name in configs:
        network: Any = built(family, name, configs[name], seed).to(dtype)
        network.save_pretrained(path / name)
        index[name] = ["transformers" if name.startswith("text") else "diffusers", table.parts[name].classes[0]]
    (path / "scheduler").mkdir()
    told = {} if "shift" in table.scheduler else {"prediction_type": "epsilon"}
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(told | table.scheduler))
    (path / "model_index.json").write_text(json.dumps(index, indent=1))
    for name, words in table.tokenizers.items():
        if words.clip:
            write_tokenizer(path / name, pad=words.pad)
        elif words.component in configs:
            t5_tokenizer().save_pretrained(path / name)
    return path


def t5_tokenizer() -> T5Tokenizer:
    """One of T5's kind that knows a few words and the letters, fewer than 128 tokens in all."""
    words = [f"▁{word}" for word in "a photo of cat dog the sks very long caption about".split()]
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "<>"]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    return T5Tokenizer(vocab=[*marks, *((word, -2.0) for word in words), *((sign, -6.0) for sign in letters)],
                           extra_ids=0, model_max_length=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(CONFIGS), default="sd1")
    parser.add_argument("--size", choices=["mini", "real"], default="mini")
    parser.add_argument("--layout", choices=["ldm", "diffusers"], default="ldm")
    parser.add_argument("--variant", choices=list(CHANNELS), default="")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    write_checkpoint(chosen.output, chosen.family, chosen.size, chosen.layout, chosen.seed,
                     getattr(torch, chosen.dtype), chosen.variant)


if __name__ == "__main__":
    main()
