"""The loop. One, for every method, objective and family; read from top to bottom.

What it leaves for other programs is in `artifacts`, what it takes to go on exactly where it stopped in `resume`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.core.rng import Draws, seed_for
from impasto.data.dataset import check_folder
from impasto.data.pictures import pictures_of
from impasto.data.sets import label
from impasto.data.source import prepare_source
from impasto.families.blocks import blocks_of
from impasto.families.load import load_base, locate
from impasto.methods import METHODS
from impasto.methods.base import Method, all_off, check_method, group_of
from impasto.objectives import OBJECTIVES
from impasto.training.artifacts import Artifacts
from impasto.training.counted import Count
from impasto.training.environment import Precision, choose_device, settle
from impasto.training.frugal import check_here
from impasto.training.full_device import memory_is_full
from impasto.training.fused import FusedBackward
from impasto.training.journal import Journal
from impasto.training.kept_recipe import compare_recipe
from impasto.training.native import at_native_size
from impasto.training.offload import Activations, Blocks, States
from impasto.training.optimizers import choose, make_optimizer, remarks
from impasto.training.outcome import Outcome
from impasto.training.previews import Previews, evaluating
from impasto.training.processes import Processes
from impasto.training.rates import rate_factor, set_rates, split_by_path
from impasto.training.recipe import Recipe
from impasto.training.requests import Requests
from impasto.training.resume import Circumstances, Memory, resume
from impasto.training.room import ask_for_room
from impasto.training.rounding import Steps
from impasto.training.run import Run
from impasto.training.sharing.after import announce, push_after
from impasto.training.shown import Shown
from impasto.training.step import step as step_losses
from impasto.training.stop import StopWish
from impasto.training.trackers.tracking import Tracking
from impasto.training.validation import Validation
from impasto.training.verdicts import Verdicts, not_finite


def train(recipe: Recipe, report: Reporter = SILENT, *, stop_after: int | None = None,
          accept_changes: bool = False, foreseen: Mapping[str, Any] | None = None) -> Outcome:
    """Train from a recipe, or go on exactly where its directory stopped. Raises `UserError`.

    After step `stop_after` it stops as if it had been asked to. `accept_changes`: go on with another recipe, or other
    pictures, than those that the run began with. Started by torchrun or accelerate, it is one of
    several processes that train as one; only the first of them writes and reports. `foreseen`: what was forecast of
    it, for its log, where what it takes stands too.
    """
    if recipe.data is None:
        raise UserError("[data] is missing", where="recipe", fix="say which pictures: data.folder=…")
    assert recipe.base.place
    for number, one in enumerate(recipe.data.sets):
        if one.source == "folder":
            check_folder(one.folder, f"{label(number, recipe.data)}.folder")
    recipe = at_native_size(recipe)
    folder = Path(recipe.output.dir)
    name = recipe.output.name or folder.absolute().name
    with Processes.joined(recipe.train.device) as processes, contextlib.ExitStack() as held:
        report = report if processes.first else SILENT
        run = Run(folder, name, report)
        with processes.all_or_none():  # the others look into the directory when it is whole
            if processes.first:
                run = held.enter_context(Run.open(folder, name, report))
                compare_recipe(run, recipe.plain(), accept=accept_changes)
                announce(recipe.output, report)
        with processes.all_or_none():
            trainer = Trainer(recipe, run, report, processes, accept_changes=accept_changes)
        outcome = trainer.train(stop_after, foreseen)
    if outcome.artifact is not None and processes.first:
        push_after(recipe.output, outcome.artifact, report)
    return outcome


@final
class Trainer:
    """Everything that a run holds in memory, and the loop over it."""

    def __init__(self, recipe: Recipe, run: Run, report: Reporter, processes: Processes | None = None, *,
                 accept_changes: bool = False) -> None:
        assert recipe.data is not None
        self.recipe, self.options, self.run, self.report = recipe, recipe.train, run, report
        self.processes = processes or Processes()
        settle(self.options.deterministic)
        self.device = choose_device(self.processes.device(self.options.device))
        self.precision = Precision.choose(self.options.precision, self.device)
        choose(self.options, self.device)  # says what is missing or wrong before anything is loaded
        check_here(self.options, self.precision, self.processes)
        self.tracking = Tracking(recipe, run.folder, run.name, report)
        if not recipe.base.download:
            locate(recipe.base.place)  # a wrong path is told before pictures are looked at, which may take minutes
        pictures = pictures_of(recipe.data, recipe.prior, recipe.validation, self.options.seed, report)
        with report.phase("loading the base"):
            self.base = load_base(recipe.base.place, family=recipe.base.family, vae=recipe.base.vae,
                                  clip_skip=recipe.base.clip_skip, download=recipe.base.download,
                                  prediction=recipe.base.prediction, text_encoders=recipe.base.text_encoders,
                                  options=recipe.base.options, quantize=recipe.base.quantize,
                                  quantize_text=recipe.base.quantize_text,
                                  device=self.device, dtype=self.precision.dtype, report=report,
                                  adapters=recipe.base.adapters,
                                  init_seed=self.options.seed if recipe.base.init == "random" else None)
        fingerprint, origin = self.base.fingerprint(), self.base.origin()  # before anything trains
        self.objective = OBJECTIVES.get(recipe.objective.kind)(recipe.objective)
        self.methods: list[Method] = [METHODS.get(options.kind)(options) for options in recipe.method]
        for method in self.methods:
            check_method(method, self.base)
        trains = frozenset[str]().union(*(method.trains(self.base) for method in self.methods))
        self.source = prepare_source(
            self.base, recipe.data, recipe.prior, trains=trains, batch_size=self.options.batch_size,
            accumulation=self.options.accumulation, seed=self.options.seed, device=self.device,
            reads=self.objective.reads, report=report, rank=self.processes.rank, world=self.processes.count,
            pictures=pictures)
        groups = [group for method in self.methods for group in method.prepare(self.base, self.options.seed)]
        self.objective.meet(self.base, functools.partial(all_off, self.methods), trains)
        own = self.objective.prepare(self.base, self.source.label_sizes, self.options.seed)
        groups += [group_of(module, f"objective.{name}", name) for name, module in own.items()]
        #: everything that trains, under its name in a checkpoint
        self.trained = {f"method.{i}.{name}": module for i, method in enumerate(self.methods)
                        for name, module in method.modules().items()}
        self.trained |= {f"objective.{name}": module for name, module in own.items()}
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = make_optimizer(split_by_path(groups, self.options.rates), self.options, self.device)
        for line in remarks(self.options, self.optimizer):
            report.warn(line)
        self.shown = Shown(self.parameters, self.optimizer, self.options.ema)
        self.verdicts = Verdicts(self.trained)
        self.scaler = self.precision.scaler()
        self.states = States(self.optimizer) if "optimizer" in self.options.offload else None
        self.steps = Steps(self.optimizer, self.trained, self.options.seed, apart=self.options.fused_backward,
                           states=self.states)
        self.fused = FusedBackward(self.steps, self.parameters) if self.options.fused_backward else None
        self.activations = Activations(self._weights) if "activations" in self.options.offload else None
        self.previews = Previews(recipe, run.folder / "previews", self.source.example)
        if self.options.checkpointing:
            self.base.checkpoint_gradients(float(self.options.checkpointing))
        self.blocks = Blocks(blocks_of(self.base.denoiser).values(), self.device) \
            if "blocks" in self.options.offload else None
        if self.options.compile:
            self.base.denoiser.compile()
        self.base.sleep(self.base.components.keys() - trains - {self.base.denoiser_name} - self.source.needs)
        self.total = self.options.known_steps or (self.options.epochs or 0) * self.source.epoch_steps
        for method in self.methods:
            method.begin(self.total)
        self.pictures = self.options.batch_size * self.options.accumulation * self.processes.count
        self.validation = Validation(recipe.validation, self.source, self.options.seed, self.total, self.pictures,
                                     report)
        self.memory = Memory(self.trained, self.optimizer, self.shown, self.scaler, self.verdicts, self.validation)
        self.circumstances = Circumstances(recipe, self.total, self.source.fingerprint, fingerprint, self.device,
                                           self.source.share.group, self.processes, accept_changes)
        self.artifacts = Artifacts(recipe, run, self.base, self.methods, self.objective, self.source, self.shown,
                                   self.device, origin)
        self.artifacts.check()
        for method in self.methods:
            method.look(self.source.captions())
        told = (line for method in self.methods for line in method.remarks())
        for line in (*told, *self.source.describe(), *self.validation.describe()):
            report.note(line)

    # --- the loop ----------------------------------------------------------------------------------------
    def train(self, stop_after: int | None = None, foreseen: Mapping[str, Any] | None = None) -> Outcome:
        """Take the steps that are left, then save the artifact."""
        started, first = time.monotonic(), resume(self.run, self.memory, self.circumstances, self.report)
        if self.states is not None:
            self.states.leave(self.parameters)
        step = first
        if foreseen is not None and self.processes.first:
            self.run.log(event="forecast", step=first, **foreseen)
        if self.processes.first and first < self.total:
            ask_for_room(self.run, self.recipe.output, self.memory.size(), self.artifacts.size(), self.report)
        with StopWish.listening() as wish, Requests.listening(self.run.folder) as requests, \
                Count(self.device, wanted=foreseen is not None) as count, \
                Journal(self.run, self.device, first, self.tracking if self.processes.first else None) as journal, \
                self.report.phase("training", self.total, "steps") as advance:
            advance(first)
            if self.processes.first and first < self.total and self.previews.due(first, self.total):
                self._preview(first)
            if self.validation.missed(first):  # at the very first, or where a stop has put it off
                self._validate(first, journal, wish)
            count.begin()
            while step < self.total and not wish.asked and not self.validation.over:
                clock = time.monotonic()
                set_rates(self.optimizer, rate_factor(step, self.total, self.options))
                try:
                    loss = self._accumulate(step)
                except torch.OutOfMemoryError as error:
                    raise self._full(step, first, error) from error
                norm = self._update(step)
                step += 1
                self.shown.update(step)
                count.stepped()
                advance(1, journal.step(step, loss, norm, self.optimizer, self.pictures, time.monotonic() - clock))
                if self.validation.due(step):
                    self._validate(step, journal, wish)
                asked = requests.take() if self.processes.first else frozenset()
                if "stop" in asked or step == stop_after:
                    wish.asked = wish.asked or signal.SIGTERM
                wish.asked = next(filter(None, self.processes.gathered(wish.asked)), None)
                if self.processes.first:
                    self._keep(step, asked, stopping=wish.asked is not None)
            ended = self.validation.over if step < self.total else None
            mean, finished = journal.mean_loss, step >= self.total or ended is not None
            journal.finished = finished
        if finished:
            if ended is not None:
                self.report.note(f"ended after step {step}: {ended}")
            if step > first:
                self.verdicts.end()
            if self.processes.first:
                self.artifacts.save(self.artifacts.path(), step)
        if (taken := count.figures()) and self.processes.first:
            self.run.log(event="memory", step=step, **taken)
        return Outcome(self.artifacts.path() if finished else None, step, first, mean, time.monotonic() - started,
                       None if finished else wish.asked, self.processes.rank, self.validation.last, ended,
                       taken.get("allocated"))

    def _keeping(self) -> contextlib.AbstractContextManager[None]:
        """Where a forward keeps what its backward needs."""
        return contextlib.nullcontext() if self.activations is None else self.activations.away()

    def _weights(self) -> Iterator[Tensor]:
        """What a step reads that is there all the time."""
        yield from self.parameters
        for network in self.base.awake_networks():
            yield from itertools.chain(network.parameters(), network.buffers())

    def _full(self, step: int, first: int, error: torch.OutOfMemoryError) -> UserError:
        """Save what step `step` has not touched yet: its gradients alone are lost."""
        self.optimizer.zero_grad(set_to_none=True)
        whole = self.processes.first and self.fused is None and step > first  # a fused backward has taken steps
        if whole and not self._saved(step):
            error.__traceback__ = None  # which holds the tensors of the step
            torch.cuda.empty_cache()
            self.run.save(self.memory.state(step), self.circumstances.manifest(), self.recipe.output.keep,
                          self.recipe.output.keep_every)
        taken = {"train.checkpointing=true"} if self.options.checkpointing else set()
        taken |= {"train.batch_size=1"} if self.options.batch_size == 1 else set()
        taken |= {"base.quantize=int8"} if self.recipe.base.quantize != "none" or any(
            method.in_place for method in self.methods) else set()
        return memory_is_full(error, step, self.device, self.run, whole or self._saved(step), taken)

    def _saved(self, step: int) -> bool:
        return any(int(folder.name) == step for folder in self.run.checkpoints())

    def _accumulate(self, step: int) -> float:
        """Forward and backward over the micro-batches of an optimizer step; the mean loss over all processes."""
        total, finite = torch.zeros((), device=self.device), list[tuple[list[str], Tensor]]()
        if self.fused is not None:
            self.fused.begin(step, (parameter for method in self.methods for parameter in method.resting(step)))
        for micro, batches in enumerate(self.source.micro_batches(step)):
            # dropout, and whatever else draws
            torch.manual_seed(seed_for(self.options.seed, step, micro, self.processes.rank))
            for batch in batches:
                batch = batch.to(self.device)
                draws = Draws(self.options.seed, step, batch.samples, self.device)
                with self.precision.autocast(), self._keeping():
                    losses = step_losses(self.base, batch, self.objective, draws)
                finite.append((batch.names, losses.isfinite()))
                loss = losses.sum() / self.pictures
                if self.fused is None or bool(finite[-1][1].all()):  # whose backward would have changed the weights
                    self.scaler.scale(loss).backward()
                total += loss.detach()
        for method in self.methods:
            if (penalty := method.penalty()) is not None:
                self.scaler.scale(penalty / self.processes.count).backward()  # gradients are added up
        mean = self.processes.total(total).item()
        if not math.isfinite(mean):
            own = [name for names, good in finite for name, fine in zip(names, good.tolist(), strict=True) if not fine]
            raise not_finite(step, self.processes.gathered(own), self.precision, self.run)
        return mean

    def _update(self, step: int) -> float:
        """The optimizer's step; the gradients' norm before clipping."""
        if self.fused is not None:  # it has been taken
            self.verdicts.gradients(step, self.fused.had())
            norm = self.fused.norm()
        else:
            norm = self._step(step)
        for method in self.methods:
            method.after_step(step)
        return norm.item()

    def _step(self, step: int) -> Tensor:
        """The optimizer's step of all gradients at once; their norm before clipping."""
        self.processes.add_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        self.verdicts.gradients(step)
        for method in self.methods:
            for parameter in method.resting(step):
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip or float("inf"))
        self.steps.take(step, self.scaler)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _validate(self, step: int, journal: Journal, wish: StopWish) -> None:
        """The loss of what is shown on held-out pictures; the artifact of the lowest one is kept.

        A wish to stop puts it off: the next sitting begins with it.
        """
        loss: float | None = math.nan
        if self.processes.first:
            with self.report.phase(f"validation at step {step}"), self.shown.weights(), \
                    evaluating(self.trained.values()):
                loss = self.validation.loss(self.base, self.objective, self.precision, self.device,
                                            lambda: wish.asked is not None and step < self.total)
        loss = self.processes.gathered(loss)[0]  # so that all end together
        if loss is None:
            return
        lowest = self.validation.take(step, loss)
        journal.validated(step, loss)
        if lowest and self.recipe.validation.keep_best and self.processes.first:
            self.artifacts.save(self.artifacts.path("best"), step)

    # --- what is kept ------------------------------------------------------------------------------------
    def _keep(self, step: int, asked: frozenset[str], *, stopping: bool) -> None:
        """Artifact, preview and checkpoint, in this order, where they are due or asked for after `step`.

        The checkpoint comes last: whatever a kill takes away before it is made again after the resume. Who stops does
        not wait for a preview: the next sitting begins with it.
        """
        stopping = stopping and step < self.total
        output = self.recipe.output
        every = output.save_every or output.save_every_epochs * self.source.epoch_steps
        if step < self.total and ("save" in asked or (every and step % every == 0)):
            self.artifacts.save(self.artifacts.path(step), step)
        if "preview" in asked or (self.previews.due(step, self.total) and not stopping):
            self._preview(step)
        ending = stopping or step == self.total or self.validation.over
        if ending or "save" in asked or step % output.checkpoint_every == 0:
            self.run.save(self.memory.state(step), self.circumstances.manifest(), output.keep, output.keep_every)

    def _preview(self, step: int) -> None:
        with self.report.phase(f"preview at step {step}"), self.shown.weights():
            files = self.previews.make(self.base, self.methods, self.precision, step)
        self.tracking.pictures(step, self.previews.prompts, files)
