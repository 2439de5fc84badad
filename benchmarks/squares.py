"""What weights, gradients and the optimizer take in a card's memory, as squares of 1 GiB: pictures for the documents.

    python -m benchmarks.squares [--folder docs/pictures]

Counted from the networks that Stable Diffusion 1.5's authors published, built without weights. Activations and what
the machine itself takes are not in it: `impasto plan` traces a step for these.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

from impasto.families.networks import build
from impasto.formats.configs import CONFIGS
from impasto.planning.cards import card_of
from impasto.planning.drawn import draw
from impasto.planning.picture import Column, show, squares

#: AdamW's two moments, in the type of the weights
MOMENTS = 2


@functools.cache
def parameters(family: str) -> dict[str, int]:
    """Parameters of each component, by its name."""
    return {name: sum(p.numel() for p in build(part.classes[0], part.config).parameters())
            for name, part in CONFIGS.get(family).parts.items()}


@functools.cache
def lora(family: str, rank: int) -> int:
    """Parameters of a LoRA on the UNet's attention: rank times the inputs and outputs of each of its layers."""
    from impasto.families.unet_targets import targets

    part = CONFIGS.get(family).parts["unet"]
    unet = build(part.classes[0], part.config)
    shapes = [unet.get_parameter(path.removeprefix("unet.") + ".weight").shape
              for path in targets({"unet": unet}, ("unet",), "attention")]
    return sum(rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)


def columns(family: str = "sd1", card: str = "12GiB") -> list[Column]:
    """Full fine-tuning of UNet and text encoder in fp32, the same all in fp16, and a LoRA beside fp16 weights."""
    counts = parameters(family)
    trained = sum(count for name, count in counts.items() if name != "vae")
    adapter = lora(family, 16)

    def taken(width: int, trained: int, trained_width: int) -> dict[str, int]:
        return {**{name: width * count for name, count in counts.items()}, "gradients": trained_width * trained,
                "optimizer": MOMENTS * trained_width * trained}

    return [Column("fp32: UNet and text encoder", taken(4, trained, 4), card_of(card)),
            Column("the same, all of it in fp16", taken(2, trained, 2), card_of(card)),
            Column("LoRA of rank 16, the rest in fp16", taken(2, adapter, 4) | {"adapter": 4 * adapter}, card_of(card))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/pictures"))
    told = parser.parse_args()
    for name, count in parameters("sd1").items():
        print(f"{name}: {count / 1e6:.2f} M parameters")
    made = columns()
    show(squares(made, 100), sys.stdout)
    for ending in (".png", ".svg"):
        draw(made, told.folder / f"squares{ending}")


if __name__ == "__main__":
    main()
