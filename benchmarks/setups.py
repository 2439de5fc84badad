"""Set-ups of the two methods that are known to be touchy, on the embedded base.

    python -m benchmarks.setups                       both tables of docs/methods.md
    python -m benchmarks.setups --only hypernetwork --steps 100

*Textual inversion*: how far the learned vectors' norm drifts from the vocabulary's, and what that costs: pictures in
which the striped heart is seen (fidelity), and of prompts that say more than its word, those whose background, place,
and other thing beside it are the ones asked for. *Hypernetworks*: the mean loss of the last quarter of the steps, at a
constant rate after five steps' warm-up, without class pictures, one seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import NAMES, Cell, measure, options
from benchmarks.common import print_table
from benchmarks.obedience import obedience
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter
from impasto.methods.token_values import mean_norm

RATES = ("1e-2", "0.2")
#: what holds the norm -> overrides
HELD = {"nothing": ["method.norm_penalty=0"], "penalty 0.1 (default)": [],
        "projection": ["method.norm_penalty=0", "method.project=true"]}

#: set-up of a hypernetwork -> overrides
NETWORKS = {
    "A1111's defaults: normal start, linear, 1e-5": ["method.initialisation=normal", "method.activation=linear",
                                                     "train.learning_rate=1e-5"],
    **{f"{name}, linear, {rate}": [f"method.initialisation={start}", "method.activation=linear",
                                   f"train.learning_rate={rate}"]
       for rate in ("3e-4", "2e-3", "1e-2") for name, start in (("normal start", "normal"),
                                                                ("last layer zero", "zero_last"))},
    "last layer zero, relu, 2e-3": ["train.learning_rate=2e-3"],
    "last layer zero, relu, 4e-3 (mini/hypernetwork)": [],
    "last layer zero, swish and LayerNorm, 2e-3": ["method.activation=swish", "method.layer_norm=true",
                                                   "train.learning_rate=2e-3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["textual_inversion", "hypernetwork"])
    parser.add_argument("--seeds", type=int, default=3, help="of textual inversion")
    parser.add_argument("--steps", type=int, default=100, help="of a hypernetwork")
    options(parser)
    chosen = parser.parse_args()
    if chosen.only != "hypernetwork":
        words(chosen.seeds, chosen.folder, chosen.jobs)
    if chosen.only != "textual_inversion":
        networks(chosen.steps, chosen.folder, chosen.jobs)


# --- textual inversion ---------------------------------------------------------------------------------
def word_cells(seeds: int) -> dict[tuple[str, str], list[Cell]]:
    """By rate and by what holds the norm."""
    return {(rate, name): [Cell("textual_inversion", "familiar", seed, (f"train.learning_rate={rate}", *overrides))
                           for seed in range(seeds)] for rate in RATES for name, overrides in HELD.items()}


def words(seeds: int, folder: Path, jobs: int) -> None:
    cells = word_cells(seeds)
    measure([cell for own in cells.values() for cell in own], folder, jobs)
    rows = []
    for (rate, name), own in cells.items():
        told = [cell.figures(folder) | obedience(cell, folder) | {"norm": norm(cell.adapter(folder))} for cell in own]
        rows.append([rate, name, f"{mean(told, 'norm'):.2f}", *(f"{100 * mean(told, key):.0f}" for key in (
            "recognised_after", "backgrounds", "placed", "second", "old_after"))])
    vocabulary = mean_norm(load_base("mini").vocabulary("text_encoder").table.weight).item()
    print(f"\nTextual inversion, {seeds} seed(s); the vocabulary's mean norm is {vocabulary:.2f}\n")
    print_table(["rate", "held by", "mean norm", "fidelity, %", "background, %", "place, %", "what is beside it, %",
                 "old prompts, %"], rows)


def norm(adapter: Path) -> float:
    """The mean norm of the vectors that were learned."""
    (vectors,) = load_adapter(adapter).embeddings[NAMES["familiar"]].values()
    return mean_norm(vectors).item()


def mean(told: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(each[key] for each in told)


# --- hypernetworks -------------------------------------------------------------------------------------
def networks(steps: int, folder: Path, jobs: int) -> None:
    constant = ("prior.weight=0", "train.schedule=constant", "train.warmup=5", f"train.steps={steps}")
    cells = {name: Cell("hypernetwork", overrides=(*constant, *overrides)) for name, overrides in NETWORKS.items()}
    measure([*cells.values()], folder, jobs)
    print(f"\nHypernetworks, {steps} steps\n")
    print_table(["set-up", "loss"], [[name, f"{cell.figures(folder)['loss']:.4f}"] for name, cell in cells.items()])


if __name__ == "__main__":
    main()
