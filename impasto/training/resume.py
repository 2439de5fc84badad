"""Exact resume: what a checkpoint holds, and how a run goes on from it.

It takes little: draws, order and rates are functions of the step; a checkpoint holds what is trained, the optimizer's
state and the loss scale; everything else follows from the recipe, and must be as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from impasto.core.errors import UserError
from impasto.core.files import key_of
from impasto.core.progress import Reporter
from impasto.training.environment import describe, differences
from impasto.training.kept_recipe import keep_recipe
from impasto.training.optimizer_state import pack_optimizer, unpack_optimizer
from impasto.training.processes import Processes
from impasto.training.recipe import Recipe
from impasto.training.run import Run, State
from impasto.training.shown import Shown
from impasto.training.validation import Validation
from impasto.training.verdicts import Verdicts

#: what to do where a checkpoint does not fit the recipe
BACK = "put the recipe back, or choose another output.dir"


@dataclass
class Memory:
    """All that a step changes: what the next one depends on, beside its number."""

    trained: Mapping[str, nn.Module]  # by their names in a checkpoint
    optimizer: torch.optim.Optimizer
    shown: Shown
    scaler: torch.amp.GradScaler
    verdicts: Verdicts
    validation: Validation

    def state(self, step: int) -> State:
        """As it is after optimizer step `step`."""
        tensors, values = pack_optimizer(self.optimizer)
        for prefix, module in self.trained.items():
            tensors.update({f"{prefix}.{key}": tensor for key, tensor in module.state_dict().items()})
        tensors.update(self.shown.state())
        return State(step, tensors, {"optimizer": values, "scaler": self.scaler.state_dict(),
                                     "layout": self._layout(),
                                     "beginning": self.verdicts.beginning, "validation": self.validation.state()})

    def size(self) -> int:
        """Bytes of a checkpoint. An optimizer that has taken no step yet is reckoned to keep two numbers a weight."""
        tensors = [t for module in self.trained.values() for t in module.state_dict().values()]
        states, _ = pack_optimizer(self.optimizer)
        kept = [*tensors, *self.shown.state().values(), *(states.values() or 2 * tensors)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def _layout(self) -> str:
        """A digest of what the optimizer's state is of: its class, and which weights are in which of its groups."""
        names = {id(parameter): f"{prefix}.{name}" for prefix, module in self.trained.items()
                 for name, parameter in module.named_parameters()}
        kind = type(self.optimizer).__name__.removeprefix("Paged")  # which is so on a GPU alone
        return key_of(kind, [[names.get(id(parameter), "") for parameter in group["params"]]
                             for group in self.optimizer.param_groups])

    def load(self, state: State) -> None:
        """Put back what `state` gave. Raises `UserError` where that is of other weights, or of another optimizer."""
        known = tuple(f"{prefix}." for prefix in self.trained)
        if lost := [key for key in state.tensors if key.startswith("method.") and not key.startswith(known)]:
            raise _other(state, f"{lost[0]} and others", ".".join(lost[0].split(".")[:2]))
        for prefix, module in self.trained.items():
            own = {key.removeprefix(f"{prefix}."): tensor for key, tensor in state.tensors.items()
                   if key.startswith(f"{prefix}.")}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise _other(state, " ".join(str(error).split())[:200], prefix) from error
        if state.values.get("layout", own := self._layout()) != own:  # older ones have none
            raise UserError(f"the checkpoint of step {state.step} holds the state of another optimizer, or of one that "
                            "has the weights in other groups (train.rates)", where="train.optimizer", fix=BACK)
        if self.shown.state().keys() - state.tensors.keys():
            raise UserError(f"the checkpoint of step {state.step} holds no averages to go on with", where="train.ema",
                            fix=BACK)
        self.shown.load(state.tensors)
        self.verdicts.begin(state.values.get("beginning"))
        self.validation.load(state.values.get("validation"))
        unpack_optimizer(self.optimizer, state.tensors, state.values["optimizer"])
        if state.values["scaler"]:  # of another precision there is nothing to go on with
            self.scaler.load_state_dict(state.values["scaler"])


def _other(state: State, told: str, where: str) -> UserError:
    return UserError(f"the checkpoint of step {state.step} holds other weights than this recipe trains ({told})",
                     where=where, fix=BACK)


@dataclass
class Circumstances:
    """What else the next step depends on, none of which training changes: kept in a manifest, compared at a resume."""

    recipe: Recipe
    total: int  # optimizer steps
    data: str  # fingerprint
    base: dict[str, str]  # fingerprint by component
    device: torch.device
    group: int  # pictures of a micro-batch in all processes
    processes: Processes
    accept_changes: bool = False  # other pictures are told of, not refused

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint tells of them, JSON-able."""
        return {"total": self.total, "data": self.data, "base": self.base, "environment": describe(self.device),
                "group": self.group, "processes": self.processes.count}

    def compare(self, manifest: Mapping[str, Any], run: Run, report: Reporter) -> None:
        """Warn of what may change the last bits. Raises `UserError` for what changes more."""
        if manifest["data"] != self.data:
            changed = "the pictures, their captions or their cuts have changed since this run was stopped"
            if not self.accept_changes:
                raise UserError(changed, where=run.folder, fix="put them back, choose another output.dir, or go on "
                                "with them by --accept-changes")
            report.warn(f"{changed}; it goes on with them, as told")
        if manifest["base"] != self.base:
            raise UserError("the base is not the one this run began with", where=self.recipe.base.place,
                            fix="put it back, or choose another output.dir")
        for line in self.processes.compared(manifest, self.group, run.folder):
            report.warn(line)
        for line in differences(manifest["environment"], describe(self.device)):
            report.warn(f"{line}: the last bits of what follows may differ from an uninterrupted run")


def resume(run: Run, memory: Memory, circumstances: Circumstances, report: Reporter) -> int:
    """Go on from the newest checkpoint, if there is one; the number of steps it holds. Raises `UserError`.

    The recipe is kept, in another one's place too, as soon as it is known that the checkpoint fits it.
    """
    found, first = run.latest(), circumstances.processes.first
    if found is None:
        if first:
            run.rewind_log(-1)  # steps that no checkpoint holds
            keep_recipe(run, circumstances.recipe.plain(), 0)
        memory.verdicts.begin()
        return 0
    state, manifest = found
    circumstances.compare(manifest, run, report)
    memory.load(state)
    if first:
        run.rewind_log(state.step)
        keep_recipe(run, circumstances.recipe.plain(), state.step)
    report.note(f"going on after step {state.step}")
    return state.step
