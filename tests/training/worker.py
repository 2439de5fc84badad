"""One process of several that train together: `python -m torch.distributed.run … -m tests.training.worker RECIPE OUT`.

It notes the draws of its own samples, and dies at a step if it is told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from impasto.core.rng import Draws
from impasto.training import trainer
from impasto.training.recipe import make_recipe


def note_draws(notes: list[dict[str, Any]]) -> None:
    """Let each step note which samples and pictures it takes, with their timesteps and a digest of their noise."""
    plain = trainer.step_losses

    def noted(base: Any, batch: Any, objective: Any, draws: Draws) -> torch.Tensor:
        noise = draws.normal("noise", (4,))
        notes.extend({"step": draws.step, "sample": sample, "picture": name, "time": draws.uniform("time")[i].item(),
                      "noise": hashlib.blake2b(noise[i].numpy().tobytes(), digest_size=8).hexdigest()}
                     for i, (sample, name) in enumerate(zip(batch.samples, batch.names, strict=True)))
        return plain(base, batch, objective, draws)

    trainer.step_losses = noted


def die_at(last: int, note: Path) -> None:
    """Be killed in that step, and leave a note of when."""
    plain = trainer.Trainer._update

    def update(self: trainer.Trainer, step: int) -> float:
        if step == last:
            note.write_text(str(time.time()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, step)

    trainer.Trainer._update = update


def main(recipe: str, out: str, *, dies: int | None = None) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    notes: list[dict[str, Any]] = []
    note_draws(notes)
    if dies is not None and rank == 1:
        die_at(dies, Path(f"{out}-died"))
    trainer.train(make_recipe(json.loads(Path(recipe).read_text(encoding="utf-8"))))
    Path(f"{out}-{rank}.json").write_text(json.dumps(notes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3], dies=int(sys.argv[3]) if len(sys.argv) > 3 else None)
