"""A run rehearsed on fake tensors: what the trainer does from loading to a preview, in its order.

What takes the most memory is done once, or as often as it takes to see it all: of a step's micro-batches two, since the
second finds gradients. Validation holds less than the step before it (no gradients, nothing kept), and is left out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from impasto.core.errors import UserError
from impasto.core.rng import Draws
from impasto.data import beside
from impasto.data.buckets import all_buckets, check_sizes
from impasto.data.frontier import Frontier, frontier
from impasto.data.options import DataOptions
from impasto.data.sets import DataSets
from impasto.families import prompts
from impasto.families.base import Base, Caption, Geometry, TextStates
from impasto.families.blocks import blocks_of
from impasto.families.guidance import Guidance
from impasto.methods import METHODS
from impasto.methods.base import Method, all_off, check_method, group_of
from impasto.mini.labels import LABEL_SIZES
from impasto.objectives import OBJECTIVES
from impasto.objectives.batch import Batch
from impasto.planning.ledger import Ledger
from impasto.planning.states import make_optimizer
from impasto.training.environment import DTYPES, Precision
from impasto.training.fused import FusedBackward
from impasto.training.offload import Activations, Blocks, States, to_device, to_host
from impasto.training.previews import Previews, evaluating
from impasto.training.rates import split_by_path
from impasto.training.recipe import Recipe
from impasto.training.rounding import Steps
from impasto.training.sections import DEFAULT_STEPS
from impasto.training.shown import Shown
from impasto.training.step import step as step_losses

#: micro-batches of a step that are rehearsed at most
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Stage:
    """Where a run is rehearsed."""

    recipe: Recipe  # with [data], be it invented
    precision: Precision
    device: str  # what it is for: "cuda" or "cpu"
    ledger: Ledger


class Rehearsal:
    """What a run holds in memory, and its phases in their order. Everything happens in a FakeTensorMode."""

    def __init__(self, stage: Stage, base: Base) -> None:
        self.stage, self.base, self.ledger = stage, base, stage.ledger
        recipe = self.recipe = stage.recipe
        assert recipe.data is not None
        self.data, self.options = recipe.data, recipe.train
        for name, network in base.components.items():
            for tensor in (*network.parameters(), *network.buffers()):
                self.ledger.enter(tensor, name, weights=True)
        self.objective = OBJECTIVES.get(recipe.objective.kind)(recipe.objective)
        self.methods: list[Method] = [METHODS.get(options.kind)(options) for options in recipe.method]
        for method in self.methods:
            check_method(method, base)
        self.trains = frozenset[str]().union(*(method.trains(base) for method in self.methods))
        for number, one in enumerate(self.data.sets):
            check_sizes(one, base.grid, f"data.{number}" if len(self.data.sets) > 1 else "data")
        extras = beside.wanted(base, self.data, self.objective.reads, self.trains) if self.data.folder else \
            base.extras if "extras" in self.objective.reads else ()
        self.rule: Frontier = frontier(self.trains, base.text_encoder_names, self.data, self.objective.reads,
                                       extras=extras)
        self.size = worst_bucket(self.data)
        self.caption = self.data.caption or ""
        self.asleep: list[Tensor] = []

    # --- before the first step -----------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self) -> None:
        """Class pictures are drawn, pictures and captions encoded, one by one, with the whole base on the card."""
        prior = self.recipe.prior
        if prior is not None and prior.folder is None:
            with self.ledger.at("drawing class pictures"):
                side = (self.data.resolution, self.data.resolution)
                self._draw([str(prior.caption)] * prior.batch_size, "", prior.guidance, None, side)
        if self.rule.latents or self.rule.extras:
            with self.ledger.at("encoding pictures"):
                self.base.encode_images(torch.empty(1, 3, *self.size)).float()
        if self.rule.text:
            with self.ledger.at("encoding captions"):
                self.base.encode_text([self.caption])

    def prepare(self) -> None:
        """Trainable weights, the optimizer, the average, and components that nobody needs sent away."""
        groups = [group for method in self.methods for group in method.prepare(self.base, self.options.seed)]
        self.objective.meet(self.base, functools.partial(all_off, self.methods), self.trains)
        world = any(one.source == "world" for one in self.data.sets)
        own = self.objective.prepare(self.base, LABEL_SIZES if world else (), self.options.seed)
        groups += [group_of(module, f"objective.{name}", name) for name, module in own.items()]
        self.trained = {f"method.{i}.{name}": module for i, method in enumerate(self.methods)
                        for name, module in method.modules().items()}
        self.trained |= {f"objective.{name}": module for name, module in own.items()}
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        held = {id(parameter): name for name, network in self.base.components.items()
                for parameter in network.parameters()}
        for parameter in self.parameters:
            self.ledger.enter(parameter, held.get(id(parameter), "adapter"), weights=True)
        for name, network in self.base.components.items():  # some are held in another precision now
            for parameter in network.parameters():
                self.ledger.enter(parameter, name, weights=True)
        self.ledger.gradients_of(self.parameters)
        self.optimizer = make_optimizer(split_by_path(groups, self.options.rates), self.options)
        self.shown = Shown(self.parameters, self.optimizer, self.options.ema)
        for average in self.shown.ema.averages:
            self.ledger.enter(average, "ema")
        self.scaler = self.stage.precision.scaler()
        self._means()
        awake = self.trains | {self.base.denoiser_name} | self.rule.needs
        read_again = self.recipe.base.init == "weights" and not self.recipe.base.adapters
        if self.stage.device != "cpu" or read_again:  # else they stay in the CPU's memory
            self.asleep = [tensor for name, network in self.base.components.items() if name not in awake
                           for tensor in (*network.parameters(), *network.buffers())]
            self.ledger.move(self.asleep, here=False)
        for method in self.methods:
            method.begin(self.options.known_steps or DEFAULT_STEPS)

    def _means(self) -> None:
        """What saves memory, as the trainer has it. What waits elsewhere moves in the ledger, and on a CPU nowhere."""
        cuda, offload = self.stage.device != "cpu", self.options.offload
        ways: Any = {"send": self.ledger.send, "bring": self.ledger.bring} if cuda else \
            {"send": to_host, "bring": to_device}
        self.states = States(self.optimizer, **ways) if "optimizer" in offload else None
        self.steps = Steps(self.optimizer, self.trained, self.options.seed, apart=self.options.fused_backward,
                           states=self.states)
        self.fused = FusedBackward(self.steps, self.parameters) if self.options.fused_backward else None
        self.activations = Activations(self._weights, keep=self.ledger.keep, **ways) if "activations" in offload \
            else None
        if self.options.checkpointing:
            self.base.checkpoint_gradients(float(self.options.checkpointing))
        if "blocks" in offload:
            Blocks(blocks_of(self.base.denoiser).values(), torch.device("cpu"), ahead=cuda, **ways)

    def _weights(self) -> Iterator[Tensor]:
        """What a step reads that is there all the time."""
        yield from self.parameters
        for network in self.base.components.values():
            yield from (*network.parameters(), *network.buffers())

    # --- training ------------------------------------------------------------------------------------------
    @property
    def pictures(self) -> int:
        """Of one micro-batch: class pictures come on top, and in the worst case they have the same shape."""
        return self.options.batch_size * (1 if self.recipe.prior is None else 2)

    def train(self) -> None:
        """An optimizer step of made-up gradients, so that the optimizer has its state, then a whole one.

        Every weight gets a gradient: a run in which one does not is refused (`training.verdicts`).
        """
        with self.ledger.at("backward" if self.fused is not None else "optimizer step"), self._traceable():
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter)
                self.ledger.enter(parameter.grad, "gradients")
                if self.fused is not None:
                    self.fused.ready(parameter)
            self.scaler.scale(torch.zeros(()))  # which is when it makes what it holds
            self._update(0)
        self._note_states()
        self.ledger.flops.clear()
        self.ledger.traffic = 0
        self._accumulate(1)
        with self.ledger.at("optimizer step"):
            self._update(1)
        self._note_states()
        with self.ledger.at("average"):
            self.shown.update(1)

    @contextlib.contextmanager
    def _traceable(self) -> Iterator[None]:
        """A block with the first steps of an optimizer. Raises `UserError` for one that looks at numbers."""
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise UserError(f"{self.options.optimizer} cannot be rehearsed on weights without contents",
                            where="train.optimizer",
                            fix="plan with one that keeps as much, such as adamw") from error

    def _note_states(self) -> None:
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self.ledger.enter(value, "optimizer")

    @property
    def micro_batches(self) -> int:
        """How many of a step are rehearsed."""
        return min(self.options.accumulation, MICRO_BATCHES)

    def flops(self) -> dict[str, float]:
        """Of one optimizer step: forward, backward, and what the backward computes again; a multiply-add is two."""
        share = self.options.accumulation / self.micro_batches
        return {name: share * count for name, count in self.ledger.flops.items()
                if name in ("forward", "backward", "recomputed")}

    def traffic(self) -> float:
        """Bytes that one optimizer step's operations read and write, roughly: caches know better."""
        return float(self.ledger.traffic) * self.options.accumulation / self.micro_batches

    def artifact(self) -> int:
        """Bytes of the tensors that are left at the end, in the artifact's precision."""
        width = DTYPES[self.recipe.output.dtype].itemsize
        whole = any(method.in_place for method in self.methods) and self.recipe.output.format != "delta"
        modules: Iterable[nn.Module] = self.base.components.values() if whole else (
            module for method in self.methods for module in method.modules().values())
        return width * sum(parameter.numel() for module in modules for parameter in module.parameters())

    def _keeping(self) -> contextlib.AbstractContextManager[None]:
        """A block with a forward: what it keeps for the backward is noted, or waits elsewhere."""
        if self.activations is not None:
            return self.activations.away()
        return torch.autograd.graph.saved_tensors_hooks(self.ledger.keep, lambda kept: kept)

    def _accumulate(self, step: int) -> None:
        if self.fused is not None:
            self.fused.begin(step, (parameter for method in self.methods for parameter in method.resting(step)))
        for micro in range(self.micro_batches):
            batch = self._batch(micro)
            draws = Draws(self.options.seed, step, batch.samples)
            with self.ledger.at("forward"), self.stage.precision.autocast(), self._keeping():
                losses = step_losses(self.base, batch, self.objective, draws)
                loss = losses.sum() / self.pictures
            with self.ledger.at("backward"):
                _backward(self.scaler.scale(loss))
        for method in self.methods:
            if (penalty := method.penalty()) is not None:
                with self.ledger.at("backward"):
                    _backward(self.scaler.scale(penalty))

    def _update(self, step: int) -> None:
        if self.fused is not None:  # it has been taken
            self.fused.norm()
        else:
            self._step(step)
        for method in self.methods:
            method.after_step(step)

    def _step(self, step: int) -> None:
        self.scaler.unscale_(self.optimizer)
        for method in self.methods:
            for parameter in method.resting(step):
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip or float("inf"))
        # whether a step is taken, loss scaling asks the gradients: here it always is
        self.steps.take(step, torch.amp.GradScaler("cpu", enabled=False))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _batch(self, micro: int) -> Batch:
        """One micro-batch of the worst shape."""
        count, (height, width) = self.pictures, self.size
        cells, moments = (height // self.base.cell, width // self.base.cell), 2 * self.base.latent_channels
        side = torch.tensor([[height, width]] * count)
        batch = Batch(list(range(count)), [""] * count, torch.ones(count),
                      geometry=Geometry(side, torch.zeros_like(side), side.clone()))
        if self.rule.latents:
            batch.moments = torch.empty(count, moments, *cells)
        elif self.rule.pixels:
            batch.pixels = torch.empty(count, 3, height, width)
        batch.extras = {name: torch.empty(count, 1 if name == "mask" else moments, *cells)
                        for name in self.rule.extras}
        if any(one.mask != "none" for one in self.data.sets):
            batch.mask = torch.empty(count, 1, *cells)
        if any(one.source == "world" for one in self.data.sets):
            batch.labels = torch.zeros(count, len(LABEL_SIZES), dtype=torch.long)
        if self.rule.text:
            batch.text = self._states(count)
        elif self.rule.captions:
            batch.captions = [self.caption] * count
        for tensor in _tensors(batch):
            self.ledger.enter(tensor, "batch")
        return batch

    @torch.no_grad()
    def _states(self, count: int) -> TextStates:
        """Text states as they come from the cache: of a caption, without its way through the encoders."""
        with unwatched():
            states = self.base.encode_text([self.caption])
            states = {name: torch.empty_like(state) for name, state in states.items()}
        return self.base.stack_text([states] * count)

    # --- previews ------------------------------------------------------------------------------------------
    def preview(self) -> None:
        """The pictures of one preview, all prompts in one batch, with every component awake."""
        previews = Previews(self.recipe, Path())
        if not previews.prompts:
            return
        self.ledger.move(self.asleep, here=True)
        trained = [module for method in self.methods for module in method.modules().values()]
        wanted, settings = [prompts.parse(prompt) for prompt in previews.prompts], previews.settings
        with self.ledger.at("preview"), self.shown.weights(), evaluating(trained), torch.no_grad(), \
                self.stage.precision.autocast():
            self._draw(wanted, prompts.parse(self.recipe.sample.negative), settings.guidance,
                       settings.image_guidance, (settings.height, settings.width))
        self.ledger.move(self.asleep, here=False)

    def _draw(self, wanted: list[Any], negative: Caption, guidance: float, image_guidance: float | None,
              size: tuple[int, int]) -> None:
        """One prediction for all pictures, guided, and the decoding of one of them, as `families.sampling` draws.

        A sampler's own arithmetic is on latents, which are small.
        """
        base, cells = self.base, (size[0] // self.base.cell, size[1] // self.base.cell)
        guided = Guidance(guidance, image_guidance if "picture" in base.extras else None)
        negatives = guided.negatives([negative] * len(wanted))
        states = [base.encode_negatives([caption]) for caption in negatives]
        states += [base.encode_text([caption]) for caption in wanted]
        count, side = guided.ways * len(wanted), torch.tensor([list(size)] * len(states))
        extras = {name: torch.empty(count, 1 if name == "mask" else base.latent_channels, *cells)
                  for name in base.extras}
        condition = base.condition(base.stack_text(states), Geometry(side, torch.zeros_like(side), side),
                                   {**base.sampling_extras(len(negatives), len(wanted)), **extras})
        x = torch.empty(len(wanted), base.latent_channels, *cells)
        time = torch.zeros(count, dtype=torch.float32 if base.process.prediction == "flow" else torch.long)
        x = x + guided.joined(base.predict(torch.cat([x] * guided.ways), time, condition).float())
        base.decode_latents(x[:1])


def worst_bucket(data: DataOptions | DataSets) -> tuple[int, int]:
    """Height and width of the largest shape that a picture can be cut to; of equals the one nearest to a square."""
    sizes = [size for one in data.sets for size in all_buckets(one)]
    if not sizes:
        raise UserError("no bucket has room within these bounds", where="data", fix="look at bucket_min and bucket_max")
    return max(sizes, key=lambda size: (size[0] * size[1], -abs(size[0] - size[1])))


def _backward(loss: Tensor) -> None:
    """loss.backward() without its way in, which switches off function modes: what is computed again is to see them."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    given: Iterable[Tensor | None] = (batch.weight, batch.moments, batch.pixels, batch.labels, batch.mask,
                                      *(batch.text or {}).values(), *batch.extras.values())
    if batch.geometry is not None:
        given = (*given, batch.geometry.original, batch.geometry.crop, batch.geometry.target)
    return (tensor for tensor in given if tensor is not None)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """A block whose tensors no ledger sees; they are fake all the same."""
    from torch.utils._python_dispatch import _pop_mode_temporarily

    with _pop_mode_temporarily():
        yield
