"""What must be true of a run that was killed and started again, beside one that was not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from impasto.training.run import MANIFEST, STATE
from tests.training.killing import MINUTE, Sitting, verifies


def problems(folder: Path, straight: Path, sittings: list[Sitting]) -> list[str]:
    """What is otherwise in `folder`/run than in `straight`/run, or should not be; empty if all is well."""
    run, whole = folder / "run", straight / "run"
    return [*tensors(run, whole), *values(run, whole), *previews(run, whole), *log(run, whole, sittings),
            *repeated(sittings), *leftovers(run), *(
                f"the others took {one.slowest:.0f} s to end" for one in sittings if one.slowest > MINUTE)]


def lost(sittings: list[Sitting]) -> int:
    """Steps that were taken again, since no checkpoint held them yet."""
    return sum(max(one.reached - max(one.held, one.first or 0), 0) for one in sittings if one.killed)


def tensors(run: Path, whole: Path) -> list[str]:
    """Artifacts, and weights, averages and optimizer states of the checkpoints, bit by bit."""
    found = []
    mine, theirs = (sorted(p.relative_to(place).as_posix() for p in place.rglob("*.safetensors"))
                    for place in (run, whole))
    # killed between the last checkpoint and the forgetting of an old one, both stay
    surplus = [name for name in set(mine) - set(theirs)
               if not (Path(name).name == STATE and verifies((run / name).parent))]
    if surplus or set(theirs) - set(mine):
        found.append(f"files differ: {sorted({*surplus, *(set(theirs) - set(mine))})}")
    for name in sorted(set(mine) & set(theirs)):
        a, b = load_file(run / name), load_file(whole / name)
        unequal = [key for key in sorted(a.keys() | b.keys())
                   if key not in a or key not in b or not same_bits(a[key], b[key])]
        if unequal:
            found.append(f"{name} differs in {len(unequal)} tensors, {unequal[0]} first")
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8),
                                                                     b.reshape(-1).view(torch.uint8))


def values(run: Path, whole: Path) -> list[str]:
    """What a checkpoint holds beside tensors, and whether its manifest tells its files' true digests."""
    found = []
    for state in sorted(whole.rglob(STATE)):
        place = state.parent.relative_to(whole)
        mine, theirs = (manifest(base / place) for base in (run, whole))
        found += [f"{place}/{MANIFEST} differs in {key}" for key in ("step", "values", "files", "data", "base")
                  if mine.get(key) != theirs.get(key)]
    return found


def manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def previews(run: Path, whole: Path) -> list[str]:
    """Pictures, byte by byte."""
    mine, theirs = ({p.name: p.read_bytes() for p in place.glob("previews/*.png")} for place in (run, whole))
    return [f"preview {name} differs" for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)]


def log(run: Path, whole: Path, sittings: list[Sitting]) -> list[str]:
    """Each step once, in order, with its loss; and each place where the run went on."""
    try:
        mine, theirs = entries(run), entries(whole)
    except ValueError as error:
        return [f"log.jsonl has a line that is cut short ({error})"]
    found = []
    steps = [entry["step"] for entry in mine if "loss" in entry]
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"log.jsonl has the steps {steps}")
    elif [e["loss"] for e in mine if "loss" in e] != [e["loss"] for e in theirs if "loss" in e]:
        found.append("log.jsonl has other losses")
    elif validations(mine) != validations(theirs):
        found.append(f"log.jsonl has the validations {validations(mine)}, and should have {validations(theirs)}")
    told = [entry["step"] for entry in mine if entry.get("event") == "resumed"]
    silent = Counter(one.first for one in sittings if one.first) - Counter(told)
    if silent or not set(told) <= {one.held for one in sittings}:
        found.append(f"log.jsonl tells of going on after {told}, and it was {[one.first for one in sittings]}")
    return found


def validations(log: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(entry["step"], entry["validation"]) for entry in log if "validation" in entry]


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def repeated(sittings: list[Sitting]) -> list[str]:
    """Steps taken again that a valid checkpoint held."""
    return [f"went on after step {after.first} while the checkpoint of step {before.held} was there"
            for before, after in zip(sittings, sittings[1:], strict=False)
            if after.first is not None and after.first != before.held]


def leftovers(place: Path) -> list[str]:
    """Half-written files and folders."""
    return [f"{path.relative_to(place)} was left" for path in sorted(place.rglob("*.part"))]
