"""Which part of the base learns a new thing: each part trained alone, and everything but it.

    python -m benchmarks.parts [--seeds 3] [--rates 1e-4 3e-4 1e-3] [--only norms biases] [--steps 240] [--json FILE]

Full fine-tuning of the embedded base by the demo's recipe, `mini/dreambooth`, with other parts each time; *everything*
is UNet and text encoder. *concept*: the share of pictures in which the reader recognises the mascot; *prompt*: in which
the background is the one asked for; *kept*: of prompts that have nothing to do with it, those whose shape, colour and
background are right (before: the line *nothing*); *loss*: the mean of the last quarter of the steps. Each is the mean
over the seeds, at the rate of those given at which concept and prompt together are best: a part of few weights bears a
higher one. Each cell is a run in a folder of its own under --folder, and takes minutes; a cell that is done is not done
again, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.common import print_table
from impasto.cli.console import RichReporter
from impasto.core.errors import UserError, nearest
from impasto.core.progress import Reporter
from impasto.evaluation.demo import losses, run_demo
from impasto.evaluation.lesson import Amounts
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.methods.full import Full
from impasto.training.recipe import read_tree

RECIPE, LESSON = "mini/dreambooth", "mascot"
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
FIGURES = ("concept", "prompt", "kept", "loss")


@dataclass(frozen=True)
class Cell:
    """One choice of weights."""

    name: str
    parts: list[str]
    exclude: list[str]

    def method(self) -> dict[str, Any]:
        return {"kind": "full", "parts": self.parts, "exclude": self.exclude}

    def count(self, base: Base) -> int:
        """Weights that it trains."""
        chosen = Full(Full.Options.model_validate(self.method())).chosen(base)
        return sum(parameter.numel() for parameters in chosen.values() for parameter in parameters.values())


def cells(names: Sequence[str]) -> dict[str, list[Cell]]:
    """By part, it alone and all but it; everything by itself."""
    made = {name: [Cell(f"{name} alone", PARTS[name], []), Cell(f"all but {name}", EVERYTHING, PARTS[name])]
            for name in names}
    return {"everything": [Cell("everything", EVERYTHING, [])], **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/parts"))
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    parser.add_argument("--pictures", type=int, default=Amounts().new, help="drawn of the mascot; half as many others")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures of all cells")
    chosen = parser.parse_args()
    report, base = RichReporter(), load_base("mini")
    for name in chosen.only:
        if name not in PARTS:
            raise UserError("is no part", where=name, fix=nearest(name, PARTS))
    rows, told = [], dict[str, Any]()
    before = None
    for part, pair in cells(chosen.only).items():
        row = [part]
        for cell in pair:
            by_rate = {rate: [measured(cell, rate, seed, chosen, report) for seed in range(chosen.seeds)]
                       for rate in chosen.rates}
            rate, best = max(((rate, mean(found)) for rate, found in by_rate.items()),
                             key=lambda pair: pair[1]["concept"] + pair[1]["prompt"])
            before = before or mean(by_rate[rate])
            told[cell.name] = {"weights": cell.count(base), "by rate": {f"{rate:g}": found for rate, found in
                                                                        by_rate.items()}}
            row += [f"{cell.count(base):,}", f"{rate:g}", *shown(best)]
        rows.append(row + [""] * (2 * (2 + len(FIGURES)) + 1 - len(row)))
    assert before is not None
    nothing = ["nothing", "0", "", f"{100 * before['recognised before']:.0f}", "", f"{100 * before['kept before']:.0f}"]
    head = ["weights", "rate", *FIGURES]
    print_table(["part", *(f"alone: {head[0]}", *head[1:]), *(f"all but it: {head[0]}", *head[1:])],
                [nothing + [""] * (2 * len(head) + 1 - len(nothing)), *rows])
    if chosen.json:
        chosen.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


def measured(cell: Cell, rate: float, seed: int, chosen: argparse.Namespace, report: Reporter) -> dict[str, float]:
    """A cell's figures at one rate and seed, from its folder or by a run."""
    kind = f"{chosen.steps or 'own'}-{chosen.pictures}-{rate:g}"
    folder = chosen.folder / kind / f"{cell.name.replace(', ', '-').replace(' ', '-')}-{seed}"
    found = folder / "figures.json"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder.with_suffix(".toml")
        recipe.write_text(tomli_w.dumps(tree(cell, rate, chosen.steps)), encoding="utf-8")
        result = run_demo(LESSON, folder, seed, report, recipe_name=str(recipe),
                          amounts=Amounts(new=chosen.pictures, old=chosen.pictures // 2)).scores
        logged = losses(folder)
        figures = {"concept": result.recognised_after.share, "prompt": result.backgrounds.share,
                   "kept": result.old_after.share, "loss": statistics.fmean(logged[-max(len(logged) // 4, 1):]),
                   "recognised before": result.recognised_before.share, "kept before": result.old_before.share}
        found.write_text(json.dumps(figures), encoding="utf-8")
    return json.loads(found.read_text(encoding="utf-8"))


def tree(cell: Cell, rate: float, steps: int | None) -> dict[str, Any]:
    """The demo's recipe with the cell's weights in the LoRA's place."""
    recipe = read_tree(RECIPE)[1]
    recipe["method"] = cell.method()
    recipe["train"] |= {"learning_rate": rate} | ({"steps": steps, "warmup": min(10, steps // 4)} if steps else {})
    recipe["sample"]["every"] = 0
    recipe["output"]["keep"] = 1
    return recipe


def mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(each[key] for each in found) for key in found[0]}


def shown(figures: Mapping[str, float]) -> list[str]:
    """Shares in per cent, and the loss."""
    return [f"{figures[key]:.4f}" if key == "loss" else f"{100 * figures[key]:.0f}" for key in FIGURES]


if __name__ == "__main__":
    main()
