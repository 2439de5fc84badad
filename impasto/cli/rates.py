"""`impasto train RECIPE --find-rate`: the table of rates that were tried, and the one to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from impasto.cli.console import RichReporter, emit
from impasto.cli.drawings import table

if TYPE_CHECKING:
    from impasto.training.recipe import Recipe


def find(recipe: Recipe, *, as_json: bool) -> None:
    """Try rates around the recipe's, and print what came of each."""
    from impasto.training.rate_finder import find_rate

    found = find_rate(recipe, RichReporter())
    if as_json:
        return emit({"rate": found.rate, "at_the_end": found.at_the_end, "steps": found.steps, "before": found.before,
                     "trials": [{"rate": t.rate, "loss": t.loss, "why": t.why} for t in found.trials]})
    rows = [("learning_rate", f"validation loss after {found.steps} steps"), ("none", f"{found.before:.5f}")]
    rows += [(f"{trial.rate:g}", "failed" if trial.loss is None else f"{trial.loss:.5f}") for trial in found.trials]
    print("\n".join(table(rows)))
    if found.rate is None:
        print("no rate improves on the base as it is: look at pictures and captions, or at lower rates "
              "(train.learning_rate)")
    else:
        more = "; it is the highest that was tried, and a higher one may be better" if found.at_the_end else ""
        print(f"train.learning_rate={found.rate:g} is the largest that still improves{more}; a long run may want less")
