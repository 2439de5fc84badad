"""The memory forecast beside what a run takes: the peak of two training steps, in miniature and at SD 1.5's size.

    python -m benchmarks.forecast                      miniatures of all families, on the CPU
    python -m benchmarks.forecast --real               SD 1.5's networks at 256², up to 14 GiB
    python -m benchmarks.forecast --only sd3           configurations whose name has this in it
    python -m benchmarks.forecast --device cuda        on a GPU: torch.cuda.max_memory_allocated is what is forecast
    python -m benchmarks.forecast --device cuda --real the networks of all families at their sizes, as far as they fit

Measured is the trainer itself, on random weights and a drawn picture: on a CPU by the profiler's allocation events
(`impasto.training.counted`), which do not see the scratch that oneDNN takes for itself. The two agree if they are
within 0.5 % (on a GPU 5 %) or 6 MiB, whichever is more; the exit code says whether all do.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import MIB, print_table
from impasto.core.progress import SILENT
from impasto.formats.configs import CONFIGS
from impasto.planning.kernels import WORKSPACES
from impasto.planning.memory import forecast
from impasto.training.counted import bytes_of, peak_allocated, tensors_on
from impasto.training.processes import Processes
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.run import Run
from impasto.training.trainer import Trainer
from tests.checkpoints import TOLD, component_configs, t5_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "parts": ["all"]},
    "lora": {"kind": "lora", "rank": 4, "targets": ["attention", "feed-forward"]},
    "loha": {"kind": "loha", "rank": 4, "targets": ["attention"]},
    "lokr": {"kind": "lokr", "targets": ["attention"]},
    "textual inversion": {"kind": "textual_inversion", "token": "<thing>", "vectors": 4},
    "hypernetwork": {"kind": "hypernetwork"},
}


#: pixels that families are trained at
SIDES = {"sd1": 512, "sd2": 768, "sdxl": 1024, "sd3": 1024}
#: small pictures, so that weights and what belongs to them are most of it
SMALL: dict[str, Any] = {"data": {"resolution": 64}, "method": METHODS["full"]}
FUSED = {"checkpointing": True, "fused_backward": True, "clip": 0.0}
#: what saves memory beside: of SD 1's miniature. On a CPU nothing has another place to wait in, and takes the same ways
MEANS: dict[str, dict[str, Any]] = {
    "fused backward": {**SMALL, "train": FUSED},
    "fused backward, bf16 weights": {**SMALL, "method": {**METHODS["full"], "weights": "bf16"},
                                     "train": {**FUSED, "precision": "bf16"}},
    "states and activations elsewhere": {**SMALL, "train": {"offload": ["activations", "optimizer"]}},
    "blocks elsewhere": {**SMALL, "method": METHODS["lora"], "train": {"checkpointing": True, "offload": ["blocks"]}},
}


def configurations(real: bool, device: str = "cpu") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, family and recipe of each."""
    if real and device == "cpu":
        size = {"data": {"resolution": 256}}
        yield "sd1 at its size, lora, 1, fp32", "sd1", {**size, "method": {"kind": "lora"}}
        yield "sd1 at its size, lora, 2, bf16, checkpointing", "sd1", {
            **size, "method": {"kind": "lora"}, "train": {"batch_size": 2, "precision": "bf16", "checkpointing": True}}
        yield "sd1 at its size, full, sgd", "sd1", {**size, "method": {"kind": "full"}, "train": {
            "optimizer": "sgd", "optimizer_options": {"momentum": 0.9}}}
        yield "sd1 at its size, full, adamw", "sd1", {**size, "method": {"kind": "full"}}
        return
    ways = [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "checkpointing": True},
            {"batch_size": 1, "precision": "bf16"}, {"batch_size": 4, "precision": "bf16", "checkpointing": True}]
    for i, family in enumerate(("sd1", "sd2", "sdxl", "sd3")):
        for j, (name, method) in enumerate(METHODS.items()):
            if (family, name) == ("sd3", "hypernetwork"):
                continue
            for way in ways if family == "sd1" and name == "lora" else [ways[(i + j + k) % 5] for k in range(2)]:
                size = {"data": {"resolution": SIDES[family]}} if real else {}
                yield _named(family, name, way), family, {"method": method, "train": way, **size}
    if real:
        return
    several = {"method": [METHODS["lora"], METHODS["textual inversion"]]}
    yield "sd1, lora and textual inversion", "sd1", several
    yield "sd1, lora, ema, 4 x 2", "sd1", {"method": METHODS["lora"], "train": {
        "ema": 0.99, "batch_size": 4, "accumulation": 2}}
    yield "sd1, full of text encoder too, sgd", "sd1", {
        "method": {"kind": "full", "parts": ["unet", "text-encoder"]}, "train": {"optimizer": "sgd"}}
    yield from ((f"sd1, {name}", "sd1", sections) for name, sections in MEANS.items())


def _named(family: str, name: str, way: dict[str, Any]) -> str:
    return ", ".join([family, name, str(way["batch_size"]), way.get("precision", "fp32"),
                      *(["checkpointing"] if way.get("checkpointing") else [])])


def write_bare(folder: Path, family: str, size: str) -> Path:
    """A diffusers folder with configurations and no weights, which random ones need."""
    table, configs = CONFIGS.get(family), component_configs(family, size)
    index: dict[str, Any] = {"_class_name": table.pipelines[""], **table.index}
    for name, config in configs.items():
        kind = table.parts[name].classes[0]
        index[name] = ["transformers" if name.startswith("text") else "diffusers", kind]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
    (folder / "scheduler").mkdir()
    told = {"prediction_type": "epsilon"} if family in TOLD else {}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**told, **table.scheduler}))
    for name, words in table.tokenizers.items():
        if not words.clip:
            t5_tokenizer().save_pretrained(str(folder / name))
            index[name] = ["transformers", words.classes[0]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def recipe_of(folder: Path, base: Path, sections: dict[str, Any], device: str) -> Recipe:
    """The recipe of a configuration; its one picture is in `folder`."""
    tree = {"base": {"path": str(base), "init": "random"}, "sample": {"every": 0},
            "output": {"dir": str(folder / "run")}, **sections}
    tree["data"] = {"folder": str(folder / "photos"), "caption": "a photo of <thing>", "resolution": 128,
                    "buckets": False, "cache": str(folder / "cache"), **sections.get("data", {})}
    tree["train"] = {"device": device, "precision": "fp32", **sections.get("train", {})}
    return make_recipe(tree)


def measured(recipe: Recipe, device: str) -> int:
    """The peak of two steps of the trainer, bytes; without what the process held before, whatever that was.

    It is held on to, as it would be missed if it went meanwhile; and nothing is collected, which might be at any time.
    """
    gc.collect()
    before = tensors_on(torch.device(device))
    folder = Path(recipe.output.dir)
    folder.mkdir(parents=True)
    trainer = Trainer(recipe, Run(folder, "run"), SILENT, Processes())
    steps = iter(range(9))

    def step() -> None:
        number = next(steps)
        trainer._accumulate(number)
        trainer._update(number)
        trainer.shown.update(number + 1)

    gc.collect()
    gc.disable()
    try:
        return peak_allocated(step, torch.device(device)) - bytes_of(before)
    finally:
        gc.enable()


def compare(family: str, sections: dict[str, Any], size: str, device: str) -> tuple[int, int, float]:
    """Forecast and measured, bytes, and the seconds that the forecast took; measured is 0 where it does not fit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        Image.linear_gradient("L").convert("RGB").resize((512, 512)).save(folder / "photos" / "a.png")
        recipe = recipe_of(folder, write_bare(folder / "base", family, size), sections, device)
        started = time.perf_counter()
        told = forecast(recipe, device)
        seconds = time.perf_counter() - started
        room = sys.maxsize if device == "cpu" else torch.cuda.mem_get_info(device)[0]
        truth = measured(recipe, device) if told.peak_bytes <= room else 0
    gc.collect()
    return told.in_steps + (0 if device == "cpu" else WORKSPACES), truth, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="at SD 1.5's size; on a GPU at those of all families")
    parser.add_argument("--only", default="", help="configurations with this in their name")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows, off = [], 0
    share = 0.005 if options.device == "cpu" else 0.05
    for name, family, sections in configurations(options.real, options.device):
        if options.only in name:
            told, truth, seconds = compare(family, sections, "real" if options.real else "mini", options.device)
            if not truth:
                rows.append([name, f"{told / MIB:.3f}", "", "", "", f"{seconds:.1f}", "does not fit"])
                continue
            apart = told - truth
            good = abs(apart) <= max(share * truth, 6 * MIB)
            off += not good
            rows.append([name, f"{told / MIB:.3f}", f"{truth / MIB:.3f}", f"{apart / MIB:+.3f}",
                         f"{100 * apart / truth:+.3f} %", f"{seconds:.1f}", "" if good else "off"])
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(["configuration", "forecast, MiB", "measured, MiB", "apart, MiB", "apart", "seconds", ""], rows)
    sys.exit(off > 0)


if __name__ == "__main__":
    main()
