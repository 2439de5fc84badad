"""The memory forecast: a run rehearsed on fake tensors, and what lives at the moment when most does."""

from __future__ import annotations

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from impasto.data.options import DataOptions
from impasto.formats.checkpoint import Checkpoint
from impasto.planning import kernels
from impasto.planning.allocator import least_room, replay
from impasto.planning.forecast import PARTS, Forecast
from impasto.planning.hollow import build
from impasto.planning.known import told
from impasto.planning.ledger import Ledger
from impasto.planning.rehearsal import Rehearsal, Stage
from impasto.training.environment import DTYPES, Precision
from impasto.training.native import at_native_size
from impasto.training.recipe import Recipe


def forecast(recipe: Recipe, device: str = "cuda") -> Forecast:
    """What a run of this recipe will take on a device, "cuda" or "cpu". Neither base nor pictures need be there.

    Raises `UserError` for a recipe that the trainer would refuse.
    """
    known = told(recipe.base)
    recipe, more = planned(recipe, known.checkpoint)
    precision = precision_on(recipe.train.precision, device)
    cuda = device != "cpu"
    ledger = Ledger(kernels.ROUND_TO if cuda else 1, kernels.scratch if cuda else None)
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.as_on(device):
        base = build(known, recipe.base, precision.dtype)
        with ledger:
            with ledger.at("loading"):
                rehearsal = Rehearsal(Stage(recipe, precision, device, ledger), base)
            rehearsal.encode()
            with ledger.at("preparing"):
                rehearsal.prepare()
            rehearsal.train()
            rehearsal.preview()
    parts = Counter(ledger.peak.parts)
    parts.update(kernels.beside_tensors(device))
    allocated = ledger.peak.total
    if cuda:
        allocated, taken = replay(ledger.events)
        parts["allocator"] += least_room(ledger.events, ledger.peak.total, taken) - ledger.peak.total
        allocated += kernels.WORKSPACES
    more += ["the time that what waits in the computer's memory is on its way is not counted"] \
        if cuda and recipe.train.offload else []
    moments = {moment: peak.total for moment, peak in ledger.peaks.items()}
    return Forecast({name: parts[name] for name in PARTS if parts[name]}, ledger.peak.moment, rehearsal.artifact(),
                    rehearsal.flops(), rehearsal.traffic(), moments, allocated, (*known.notes, *more))


def precision_on(name: str, device: str) -> Precision:
    """The precision of a run on a device, of which "auto" is taken for bf16 on a GPU, and fp32 elsewhere."""
    if device == "cpu":
        return Precision.choose(name, torch.device("cpu"))
    return Precision(torch.device("cpu"), DTYPES["bf16" if name == "auto" else name])


def planned(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, list[str]]:
    """The recipe with what it must have to be rehearsed, and lines on what was assumed."""
    if recipe.data is not None:
        return at_native_size(recipe, checkpoint), []
    side = checkpoint.native_size or DataOptions.model_fields["resolution"].default
    return recipe.model_copy(update={"data": DataOptions.model_validate({"resolution": side})}), \
        [f"pictures of {side}x{side} pixels, as the base was made for: data.resolution says otherwise"]
