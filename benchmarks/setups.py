"""Set-ups of the two methods that are known to be touchy, on the embedded base.

    python -m benchmarks.setups                       both tables of docs/methods.md
    python -m benchmarks.setups --only hypernetwork --steps 100

*Textual inversion*: how far the learned vectors' norm drifts from the vocabulary's, and what that costs: pictures in
which the striped heart is seen (fidelity), and whose background is the one that was asked for (prompt), by rate and by
what holds the norm. *Hypernetworks*: the mean loss of the last quarter of the steps, without class pictures, all with
the same draws. One seed each, in processes of their own, whose runs stay in --folder and are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import print_table

RATES = (1e-2, 5e-2, 2e-1)
#: what holds the norm -> overrides
HELD = {"nothing": ["method.norm_penalty=0"], "penalty 0.1 (default)": [], "penalty 1": ["method.norm_penalty=1"],
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
    parser.add_argument("--steps", type=int, default=100, help="of a hypernetwork")
    parser.add_argument("--folder", type=Path, default=Path("runs/setups"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        own = Path(chosen.child)
        return (learned if own.parent.name == "textual_inversion" else losses)(own, chosen.overrides)
    if chosen.only != "hypernetwork":
        words(chosen.folder / "textual_inversion")
    if chosen.only != "textual_inversion":
        networks(chosen.folder / f"hypernetwork-{chosen.steps}", chosen.steps)


def words(folder: Path) -> None:
    rows = []
    for rate in RATES:
        for name, overrides in HELD.items():
            told = cell(folder, f"{rate:g} {name}", [f"train.learning_rate={rate}", *overrides])
            rows.append([f"{rate:g}", name, f"{told['norm']:.2f}", *(f"{100 * told[key]:.0f}" for key in (
                "recognised_after", "backgrounds", "old_after"))])
    print(f"\nTextual inversion; the vocabulary's mean norm is {told['vocabulary']:.2f}\n")
    print_table(["rate", "held by", "mean norm", "fidelity, %", "prompt, %", "old prompts, %"], rows)


def networks(folder: Path, steps: int) -> None:
    rows = [[name, f"{cell(folder, name, [f'train.steps={steps}', *overrides])['loss']:.4f}"]
            for name, overrides in NETWORKS.items()]
    print(f"\nHypernetworks, {steps} steps\n")
    print_table(["set-up", "loss"], rows)


def cell(folder: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """One run's figures: those that lie there, or new ones from a process of its own."""
    own = folder / "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    if not (own / "figures.json").exists():
        print(name, file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.setups", "--child", str(own), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((own / "figures.json").read_text(encoding="utf-8"))


def learned(own: Path, overrides: list[str]) -> None:
    """A word for the striped heart: what is seen of it, and its vectors' mean norm."""
    from impasto.core.files import write_json
    from impasto.evaluation.demo import run_demo
    from impasto.families.load import load_base
    from impasto.formats.adapters import load_adapter
    from impasto.methods.token_values import mean_norm

    result = run_demo("familiar", own / "run", recipe_name="mini/textual_inversion", force=True,
                      overrides=["sample.every=0", *overrides])
    (vectors,) = load_adapter(result.adapter).embeddings["sks thing"].values()
    table = load_base("mini").vocabulary("text_encoder").table.weight
    write_json(own / "figures.json", {**result.plain(), "norm": mean_norm(vectors).item(),
                                      "vocabulary": mean_norm(table).item()})


def losses(own: Path, overrides: list[str]) -> None:
    """A hypernetwork's mean loss over the last quarter of its steps, at a constant rate after five steps' warm-up."""
    from impasto.core.files import write_json
    from impasto.training.recipe import load_recipe
    from impasto.training.trainer import train

    recipe = load_recipe("mini/hypernetwork", [
        "prior.weight=0", "sample.every=0", "train.schedule=constant", "train.warmup=5", *overrides,
        f"output.dir={json.dumps(str(own / 'run'))}"])
    train(recipe)
    lines = (own / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    write_json(own / "figures.json", {"loss": statistics.fmean(found[-(len(found) // 4):])})


if __name__ == "__main__":
    main()
