"""Runs on shards: resumed at the exact sample, the same in two processes as in one, and from a web server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.training.metadata import shareable
from impasto.training.recipe import make_recipe
from impasto.training.trainer import train
from tests.data.sharded import serving, write_shard
from tests.training.conftest import tree
from tests.training.test_processes import draws, run


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five pictures of three shapes, in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(photos.glob("*.png"))
    for i, own in enumerate((files[:3], files[3:])):
        members = {}
        for file in own:
            members |= {file.name: file.read_bytes(), f"{file.stem}.txt": f"picture {file.stem}".encode()}
        write_shard(folder / f"s-{i}.tar", members)
    return folder


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))


def sharded(mini: Path, shards: Path | str, out: Path, **sections: Any) -> dict[str, Any]:
    data = {"folder": None, "caption": None, "source": "shards", "shards": str(shards), "shuffle_window": 3}
    return tree(mini, Path("photos"), out, data={**data, **sections.pop("data", {})}, **sections)


def test_a_run_is_resumed_at_the_exact_sample(mini: Path, shards: Path, tmp_path: Path) -> None:
    flip = {"data": {"flip": True}}
    whole = train(make_recipe(sharded(mini, shards, tmp_path / "whole", **flip)))
    part = make_recipe(sharded(mini, shards, tmp_path / "part", **flip))
    assert train(part, stop_after=3).artifact is None
    with serving(shards) as server:
        moved = make_recipe(sharded(mini, server.url("s-{0..1}.tar"), tmp_path / "part", **flip))
        with pytest.raises(UserError, match="another recipe.*data.shards"):
            train(moved)
    resumed = train(part)
    assert resumed.step == whole.step == 6 and resumed.resumed_from == 3
    a, b = (load_file(tmp_path / name / "checkpoints" / "000006" / "state.safetensors") for name in ("whole", "part"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_from_a_server_it_is_the_same_run(mini: Path, shards: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_recipe(sharded(mini, shards, tmp_path / "local")))
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "another cache"))
    with serving(shards) as server:
        train(make_recipe(sharded(mini, server.url("s-{0..1}.tar"), tmp_path / "remote")))
    a, b = (load_file(tmp_path / name / "checkpoints" / "000006" / "state.safetensors") for name in ("local", "remote"))
    assert all(a[name].equal(b[name]) for name in a)


def test_artifacts_hold_the_last_parts_of_places(tmp_path: Path, mini: Path) -> None:
    places = [str(tmp_path / "mine" / "a-{0..3}.tar"), "https://me:secret@host/mine/b.tar?token=secret"]
    recipe = make_recipe(sharded(mini, "", tmp_path / "out", data={"shards": places}))
    assert shareable(recipe.plain())["data"]["shards"] == ["a-{0..3}.tar", "b.tar"]
    assert recipe.data is not None and recipe.data.sets[0].shards == places


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_take_the_samples_of_one(mini: Path, shards: Path, tmp_path: Path) -> None:
    made = {}
    for processes, batch in ((2, 2), (1, 4)):  # two of them find nothing read or encoded yet
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = run(folder, sharded(mini, shards, folder / "run", train={"batch_size": batch}), processes)
        assert done.returncode == 0, done.stderr
        notes = [note for rank in range(processes) for note in draws(folder, rank)]
        made[processes] = sorted(json.dumps(note, sort_keys=True) for note in notes)
    assert made[1] == made[2] and len(made[1]) == 24
