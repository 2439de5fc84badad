"""Golden loss curves: a few steps of ready recipes on the embedded base, as they were when they were last looked at.

    python -m tests.training.golden       makes the curves anew

They stand beside this file in curves/. A change of numerics anywhere between picture and optimizer shows in them;
whoever means it makes them anew, and says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from impasto.core.files import write_json
from impasto.training.recipe import load_recipe
from impasto.training.trainer import train

CURVES = Path(__file__).parent / "curves"
STEPS = 50

#: name of a curve -> its ready recipe, and what differs from it
RUNS: dict[str, tuple[str, list[str]]] = {
    "lora": ("mini/lora", []),
    "dreambooth": ("mini/dreambooth", []),
    "pretrain": ("mini/pretrain", ["data.pictures=200", "train.batch_size=8"]),
    "pretrain_text": ("mini/pretrain_text", ["data.pictures=200", "train.batch_size=8"]),
    "pretrain_vae": ("mini/pretrain_vae", ["data.pictures=200", "data.resolution=64"]),
}


def curve(name: str) -> list[float]:
    """The losses of the run of that name: on the CPU, with one thread."""
    recipe, changes = RUNS[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(load_recipe(recipe, [*changes, f"train.steps={STEPS}", "train.device=cpu", "train.seed=0",
                                       "sample.every=0", f"output.dir={json.dumps(folder)}"]))
            lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        torch.set_num_threads(threads)
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def golden(name: str) -> Path:
    """The file of a curve."""
    return CURVES / f"{name}.json"


def main() -> None:
    for name, (recipe, changes) in RUNS.items():
        write_json(golden(name), {"recipe": recipe, "changes": changes, "losses": curve(name)})
        print(golden(name))


if __name__ == "__main__":
    main()
