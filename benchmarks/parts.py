"""Which part of the base learns a new thing: each part trained alone, and everything but it.

    python -m benchmarks.parts [--seeds 3] [--rates 1e-3 3e-3] [--only norms biases] [--jobs 2]

Full fine-tuning of the embedded base by the demo's recipe, `mini/dreambooth`, with other parts each time; *everything*
is UNet and text encoder. *concept*: the share of pictures in which the reader recognises the mascot; *prompt*: in which
the background is the one asked for; *kept*: of prompts that have nothing to do with it, those whose shape, colour and
background are right (before: the line *nothing*); *loss*: the mean of the last quarter of the steps. Each is the mean
over the seeds; of a part alone at the rate of those given at which its loss is least: few weights bear a higher one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.cells import Cell, measure, options
from benchmarks.common import print_table

EVERYTHING = ["unet", "text-encoder"]

#: part -> its words for the method
PARTS: dict[str, list[str]] = {
    "down blocks": ["down_blocks"],
    "mid block": ["mid-block"],
    "up blocks": ["up_blocks"],
    "self-attention": [r"^unet.*\.attn1\."],
    "cross-attention": ["cross-attention"],
    "keys-values": ["keys-values"],
    "feed-forward": ["feed-forward"],
    "convolutions": ["convolutions"],
    "norms": ["norms"],
    "biases": ["biases"],
    "time embedding": ["time_embedding", "time_emb_proj"],
    "conv_in, conv_out": ["conv_in", "conv_out"],
    "text encoder": ["text-encoder"],
}
#: figures of a cell, as the table calls them
FIGURES = {"recognised_after": "concept", "backgrounds": "prompt", "old_after": "kept", "loss": "loss"}


@dataclass(frozen=True)
class Choice:
    """One choice of weights."""

    name: str
    parts: list[str]
    exclude: list[str]

    def rates(self, given: Sequence[float]) -> Sequence[float]:
        """Those at which it is trained."""
        return given if self.name.endswith(" alone") else given[:1]

    def cell(self, seed: int, rate: float, steps: int) -> Cell:
        """The demo's recipe with these weights in the LoRA's place."""
        return Cell("dreambooth", "mascot", seed, (
            "method.kind=full", "method.rank=", "method.targets=", f"method.parts={json.dumps(self.parts)}",
            f"method.exclude={json.dumps(self.exclude)}", f"train.learning_rate={rate:g}", f"train.steps={steps}"))


def choices(names: Sequence[str]) -> dict[str, list[Choice]]:
    """By part, it alone and all but it; everything by itself."""
    made = {name: [Choice(f"{name} alone", PARTS[name], []), Choice(f"all but {name}", EVERYTHING, PARTS[name])]
            for name in names}
    return {"everything": [Choice("everything", EVERYTHING, [])], **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3],
                        help="of parts alone; the rest trains at the first")
    parser.add_argument("--steps", type=int, default=120, help="of each training; half of the demo's")
    options(parser)
    told = parser.parse_args()
    chosen = choices(told.only)
    measure([choice.cell(seed, rate, told.steps) for pair in chosen.values() for choice in pair
             for rate in choice.rates(told.rates) for seed in range(told.seeds)], told.folder, told.jobs)
    untouched = chosen["everything"][0].cell(0, told.rates[0], told.steps).figures(told.folder)
    columns = ["weights", "rate", *FIGURES.values()]
    rows = [["nothing", "0", "", f"{100 * untouched['recognised_before']:.0f}", "",
             f"{100 * untouched['old_before']:.0f}"]]
    for part, pair in chosen.items():
        rows.append([part])
        for choice in pair:
            cells = {rate: [choice.cell(seed, rate, told.steps) for seed in range(told.seeds)]
                     for rate in choice.rates(told.rates)}
            by_rate = {rate: mean([cell.figures(told.folder) for cell in own]) for rate, own in cells.items()}
            rate, best = min(by_rate.items(), key=lambda found: found[1]["loss"])
            rows[-1] += [f"{best['trainable']:,.0f}", f"{rate:g}", *shown(best)]
    width = 1 + 2 * len(columns)
    print(f"\n{told.seeds} seed(s); shares in per cent\n")
    print_table(["part", *(f"alone: {columns[0]}", *columns[1:]), *(f"all but it: {columns[0]}", *columns[1:])],
                [row + [""] * (width - len(row)) for row in rows])


def mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(each[key] for each in found) for key in ("trainable", *FIGURES)}


def shown(figures: Mapping[str, float]) -> list[str]:
    """Shares in per cent, and the loss."""
    return [f"{figures[key]:.4f}" if key == "loss" else f"{100 * figures[key]:.0f}" for key in FIGURES]


if __name__ == "__main__":
    main()
