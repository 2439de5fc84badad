"""Train the embedded base from random weights: its VAE, its text encoder, its UNet, one run after the other.

    python -m scripts.pretrain_mini [--runs runs] [--install]

Each is a run as any other: stopped at any moment, the same command goes on. With --install the result goes into the
package. It takes hours; the model card says how many.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from impasto.cli.console import RichReporter
from impasto.mini import BASE, WEIGHTS
from impasto.training.recipe import load_recipe
from impasto.training.trainer import train

#: ready recipe, its directory, and what differs from it ({runs} is where the directories are)
RUNS: list[tuple[str, str, list[str]]] = [
    # a VAE learns edges and colours on small pictures first, at a quarter of the time
    ("mini/pretrain_vae", "mini-vae-64", ["data.resolution=64", "data.pictures=40000", "train.steps=1200",
                                          "train.batch_size=4", "train.learning_rate=4e-3"]),
    ("mini/pretrain_vae", "mini-vae", ["base.init=weights", "base.path={runs}/mini-vae-64/mini-vae-64"]),
    # whose decoder goes on learning, while latents stay as they are
    ("mini/pretrain_vae", "mini-vae-decoder", ["base.init=weights", "base.path={runs}/mini-vae/mini-vae",
                                               "method.parts=['vae-decoder']", "train.learning_rate=2e-3",
                                               "train.steps=2400"]),
    ("mini/pretrain_text", "mini-text", []),
    # a UNet learns what words mean on small pictures first, too
    ("mini/pretrain", "mini-64", ["base.path={runs}/mini-text/mini-text", "base.vae={runs}/mini-vae/mini-vae/vae",
                                  "data.resolution=64", "data.pictures=12000", "train.steps=700", "output.dtype=fp32"]),
    # then on large ones, three times, each beginning where the last ended and seeing other pictures
    ("mini/pretrain", "mini-a", ["base.path={runs}/mini-64/mini-64", "base.vae={runs}/mini-vae/mini-vae/vae",
                                 "train.steps=1300", "output.dtype=fp32"]),
    ("mini/pretrain", "mini-b", ["base.path={runs}/mini-a/mini-a", "train.steps=2000", "train.warmup=50",
                                 "train.seed=1", "data.pictures=16000", "output.dtype=fp32"]),
    ("mini/pretrain", "mini-c", ["base.path={runs}/mini-b/mini-b", "train.steps=3600", "train.warmup=50",
                                 "train.seed=7"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs' directories are")
    parser.add_argument("--install", action="store_true", help="put the weights into the package")
    chosen = parser.parse_args()
    made: Path | None = None
    for recipe, name, changes in RUNS:
        settings = [change.format(runs=chosen.runs.as_posix()) for change in changes]
        made = train(load_recipe(recipe, [f"output.dir={chosen.runs / name}", *settings]), RichReporter()).artifact
        if made is None:
            return  # stopped by the user; the same command goes on
    assert made is not None
    if chosen.install:
        for file in (*WEIGHTS, "vae/config.json"):  # the VAE's config holds its measured scale
            shutil.copyfile(made / file, BASE / file)
        install_decoder(chosen.runs / "mini-vae-decoder" / "mini-vae-decoder" / "vae")


def install_decoder(vae: Path) -> None:
    """Put a VAE with the same encoder and a better decoder into the package, in half precision."""
    file = "diffusion_pytorch_model.safetensors"
    ours = load_file(BASE / "vae" / file)
    theirs = {name: tensor.half() for name, tensor in load_file(vae / file).items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith(("encoder.", "quant_conv.")))
    save_file(theirs, BASE / "vae" / file, {"format": "pt"})


if __name__ == "__main__":
    main()
