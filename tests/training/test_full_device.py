"""Out of memory in the middle of a run: it is saved, said in one line, and goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.training import trainer
from impasto.training.trainer import train

SAID = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 5.79 GiB of which 11 MiB is free"


@pytest.mark.parametrize("fails_at", [3, 4])
def test_a_run_that_ran_out_of_memory_goes_on(recipe, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Checkpoints are due every two steps; after an odd one it is saved all the same."""
    straight, broken = recipe("straight"), recipe("broken")
    train(straight)
    calls, real = 0, trainer.step_losses

    def step(*args):
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise torch.OutOfMemoryError(SAID)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "step_losses", step)
        with pytest.raises(UserError) as caught:
            train(broken)
    line = str(caught.value)
    assert "\n" not in line and f"full at step {fails_at + 1}: 20.00 MiB more were asked for" in line
    assert f"the run is saved after step {fails_at}" in line and "train.checkpointing=true" in line
    assert train(broken).resumed_from == fails_at
    one, other = (load_file(Path(made.output.dir) / "dog.safetensors") for made in (straight, broken))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_in_the_first_step_nothing_is_saved(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*args):
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(trainer, "step_losses", step)
    made = recipe(train={"checkpointing": True, "batch_size": 1})
    with pytest.raises(UserError, match="nothing was learned yet; .*base.quantize=int8|nothing was learned yet"):
        train(made)
    assert not list((Path(made.output.dir) / "checkpoints").glob("*"))
