"""A disk that is full, or that cannot be written, at each moment of a run: one line, nothing lost, and it goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from impasto.core.errors import UserError
from impasto.training.recipe import Recipe
from impasto.training.trainer import train
from tests.training.conftest import draw
from tests.training.failing_disk import Disk
from tests.training.survival import entries, leftovers, previews, tensors, values

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")

RecipeMaker = Callable[..., Recipe]

#: of all moments of a run, every so-manieth is tried where time is short
STRIDE = 11


@pytest.fixture
def place(recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Recipe]:
    """`place(name)`: a run with all that is ever written, in name/run, and an empty cache in name/cache."""
    pictures, held_out = tmp_path / "pictures", tmp_path / "held out"
    for folder, keys in ((pictures, (1, 2)), (held_out, (3,))):
        folder.mkdir()
        for key in keys:
            draw(folder / f"{key}.png", key, (64, 64))

    def made(name: str) -> Recipe:
        monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / name / "cache"))
        return recipe(f"{name}/run", data={"folder": str(pictures)}, validation={"folder": str(held_out), "every": 1,
                                                                                  "repeats": 1},
                      train={"steps": 2, "batch_size": 1}, sample={"every": 2, "steps": 1, "prompts": ["a dog"]},
                      output={"checkpoint_every": 1, "save_every": 1, "keep": 1})

    return made


@pytest.mark.parametrize(("number", "line"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written")])
@pytest.mark.parametrize("every", [STRIDE, pytest.param(1, marks=pytest.mark.slow)])
def test_at_each_moment(place: Callable[[str], Recipe], tmp_path: Path, number: int, line: str, every: int) -> None:
    whole = place("whole")
    with Disk(tmp_path / "whole", number).mounted() as disk:
        train(whole)
    assert len(disk.moments) > 50
    kinds = {moment.split()[0] for moment in disk.moments}
    assert kinds == {"create", "mkdir", "write", "fsync", "rename", "replace"}, kinds
    for i, moment in enumerate(disk.moments):
        if i % every:
            continue
        root = tmp_path / str(i)
        made = place(str(i))
        with Disk(root, number, breaks=i).mounted() as broken, pytest.raises(UserError, match=line):
            train(made)
        assert broken.failing, moment
        run = Path(made.output.dir)
        assert not leftovers(root), moment
        assert train(made).step == 2
        found = [*tensors(run, Path(whole.output.dir)), *values(run, Path(whole.output.dir)),
                 *previews(run, Path(whole.output.dir)), *leftovers(root)]
        assert not found, (moment, found)
        assert told(run) == told(Path(whole.output.dir)), moment


def told(run: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in entries(run) for key in ("loss", "validation") if key in entry]
