"""Other programs at the jobs of `benchmarks.toolbox`, on the same files: peft, diffusers, lycoris-lora as installed.

Each does a job in the way that its own documentation shows, and writes the result. Their imports are made before the
clock starts; the first line, which does nothing, tells how much memory they take by themselves. lycoris-lora merges and
extracts in fp32, since a CPU has no SVD in fp16; diffusers fuses in the model's own type.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lycoris.utils import extract_diff, merge
from peft import PeftModel
from safetensors.torch import load_file, save_file

from impasto.toolbox.convert import convert

RANK, WIDE = 32, 64


def inputs(folder: Path) -> None:
    """The adapters and the tuned checkpoint in the layouts that these programs read."""
    for name in ("lora64", "other64"):
        if not (folder / f"{name}-peft").exists():
            convert(folder / f"{name}.safetensors", folder / f"{name}-peft", to="peft")
    if not (folder / "planted-linear").exists() and (folder / "planted-linear.safetensors").exists():
        convert(folder / "planted-linear.safetensors", folder / "planted-linear")


def pipeline(folder: Path, dtype: torch.dtype = torch.float16) -> Any:
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None,
                                                   requires_safety_checker=False, local_files_only=True)


def fused(folder: Path, out: Path) -> None:
    """Into a diffusers folder."""
    pipe = pipeline(folder / "folder")
    pipe.load_lora_weights(folder, weight_name="lora32.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(out.with_suffix(""))


def merged(folder: Path, out: Path) -> None:
    pipe = pipeline(folder / "folder", torch.float32)
    merge([pipe.text_encoder], pipe.unet, load_file(folder / "lora32.safetensors"))
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(out.with_suffix(""))


def mixed(way: str, **more: int) -> Callable[[Path, Path], None]:
    def mix(folder: Path, out: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(folder / "folder" / "unet", torch_dtype=torch.float16)
        model = PeftModel.from_pretrained(unet, folder / "lora64-peft", adapter_name="a")
        model.load_adapter(folder / "other64-peft", adapter_name="b")
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type=way, **more)
        model.save_pretrained(out.with_suffix(""), selected_adapters=["sum"])

    return mix


def extracted(folder: Path, out: Path) -> None:
    base, tuned = (pipeline(folder / name, torch.float32) for name in ("folder", "planted-linear"))
    found = extract_diff([base.text_encoder], [tuned.text_encoder], base.unet, tuned.unet, "fixed", RANK, RANK,
                         small_conv=False)
    save_file(found, out)


def converted(folder: Path, out: Path) -> None:
    pipe = StableDiffusionPipeline.from_single_file(
        str(folder / "base.safetensors"), config=str(folder / "folder"), torch_dtype=torch.float16,
        safety_checker=None, local_files_only=True)
    pipe.save_pretrained(out.with_suffix(""))


#: ours: theirs -> what is done with the folder of inputs, into an output
WORKS: dict[str, Callable[[Path, Path], Any]] = {
    "copy: nothing, with their libraries": lambda folder, out: None,
    "extract, linear and 1×1, planted: lycoris": extracted,
    "mix of two of rank 64: peft, cat": mixed("cat"),
    "mix of two of rank 64, to 64: peft, svd": mixed("svd", svd_rank=WIDE),
    "merge a rank-32 LoRA: diffusers": fused,
    "merge a rank-32 LoRA: lycoris": merged,
    "single file to folder: diffusers": converted,
}
