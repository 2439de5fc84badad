"""Methods that train a delta on each of some chosen layers: LoRA, and what is built like it.

Such a method is its options and one `make`: which layers, which rank and alpha in each, initial values, parameter
groups and the adapter are the same for all.
"""

from __future__ import annotations

import abc
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from impasto.core.errors import UserError
from impasto.methods.base import Method, MethodOptions, switched_off

if TYPE_CHECKING:
    import torch
    from torch import nn

    from impasto.deltas.adapter import Adapter
    from impasto.deltas.attach import Attachment
    from impasto.deltas.delta import Delta
    from impasto.deltas.lowrank import LowRank
    from impasto.families.base import Base


class LayerOptions(MethodOptions):
    """Which layers, and how large a delta in each. A pattern is a target word or a regular expression on paths."""

    rank: int = Field(16, ge=1, description="Size of each layer's delta (diffusers' example 4, ai-toolkit and "
                      "OneTrainer 16, kohya's examples 16 to 32).")
    alpha: float | None = Field(None, gt=0, description="The delta is multiplied by alpha / rank; default: the layer's "
                                "rank, that is, by 1 (diffusers). kohya's habit is half the rank.")
    targets: list[str] = Field(["attention"], min_length=1, description="Layers to train: words (attention, "
                               "cross-attention, feed-forward, convolutions, text-encoder, all) or regular "
                               "expressions. diffusers trains the denoiser's attention.")
    exclude: list[str] = Field([], description="Layers to leave out of them, as words or regular expressions.")
    ranks: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="Other ranks for layers that match a pattern, 0 to leave them out; the first pattern that "
        "matches counts (peft's rank_pattern).")
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Other alphas for layers that match a pattern, likewise (peft's alpha_pattern).")
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, description="Rate of the text encoders' deltas; default: learning_rate. kohya advises 1e-5 to "
        "2e-5 beside 1e-4.")


@dataclass(frozen=True)
class Choice:
    """A layer to train, and the size of its delta."""

    layer: nn.Module
    rank: int
    alpha: float


class LayerMethod(Method):
    """Trains one delta on each chosen layer, in fp32."""

    options: LayerOptions

    def __init__(self, options: LayerOptions) -> None:
        super().__init__(options)
        self.deltas: dict[str, Delta] = {}
        self.family = ""

    @abc.abstractmethod
    def make(self, choice: Choice, generator: torch.Generator) -> Delta:
        """A new delta of a layer: initial values, drawn from `generator` (on the CPU), leave the base as it is."""

    def choose(self, base: Base) -> dict[str, Choice]:
        """The layers to train, by path. Raises `UserError` for a pattern without effect, or a rank that cannot be."""
        from impasto.deltas.layers import check_layer, shape_of

        targets = list(dict.fromkeys(path for word in self.options.targets for path in base.targets(word)))
        left_out = {path for word in self.options.exclude for path in _matches(base, word, targets, "exclude")}
        ranks = _by_pattern(base, self.options.ranks, targets, "ranks")
        alphas = _by_pattern(base, self.options.alphas, targets, "alphas")
        chosen: dict[str, Choice] = {}
        seen: set[nn.Module] = set()  # a layer that is reached by two paths is trained once
        for path in targets:
            layer, rank = base.layer(path), ranks.get(path, self.options.rank)
            if path in left_out or rank == 0 or layer in seen:
                continue
            check_layer(layer, path)
            shape = shape_of(layer)
            largest = min(shape[0], math.prod(shape[1:]))
            if rank > largest:
                raise UserError(f"rank {rank} is more than this layer can use, its smaller side being {largest}",
                                where=path, fix=f"lower the rank, or give the layer its own: ranks = "
                                f"{{ '{path.replace('.', '[.]')}$' = {largest} }}; 0 leaves it out")
            default = rank if self.options.alpha is None else self.options.alpha
            chosen[path] = Choice(layer, rank, alphas.get(path, default))
            seen.add(layer)
        if not chosen:
            raise UserError("no layer is left to train", where=f"method {self.options.kind}",
                            fix="look at exclude and ranks")
        return chosen

    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        """Attach a new delta to each chosen layer; one parameter group for each component of the base."""
        import torch

        from impasto.core.rng import generator
        from impasto.deltas.attach import attach
        from impasto.deltas.layers import weight_of

        groups: dict[str, dict[str, nn.Parameter]] = {}
        self.family = base.family
        for path, choice in self.choose(base).items():
            with torch.device(weight_of(choice.layer).device):
                delta = self.deltas[path] = self.make(choice, generator(seed, "init", path))
            groups.setdefault(path.partition(".")[0], {}).update(delta.named_parameters(prefix=path))
        rates = {name: self.options.learning_rate for name in groups}
        if (rate := self.options.text_encoder_learning_rate) is not None:
            encoders = groups.keys() & set(base.text_encoder_names)
            if not encoders:
                raise UserError("no layer of a text encoder is trained",
                                where=f"method {self.options.kind}: text_encoder_learning_rate",
                                fix="add \"text-encoder\" to targets, or leave the rate out")
            rates |= dict.fromkeys(encoders, rate)
        self.attachment: Attachment = attach(base.components, self.deltas)
        return [{"params": list(named.values()), "paths": list(named), "lr": rates[name],
                 "name": f"{self.options.kind} {name}"} for name, named in groups.items()]

    def modules(self) -> dict[str, nn.Module]:
        """The deltas, by layer path."""
        return dict(self.deltas)

    def trains(self, base: Base) -> frozenset[str]:
        return frozenset(path.partition(".")[0] for path in self.choose(base))

    def off(self) -> AbstractContextManager[None]:
        return switched_off(self.attachment)

    def adapter(self) -> Adapter:
        from impasto.deltas.adapter import Adapter

        return Adapter({path: (delta.snapshot(),) for path, delta in self.deltas.items()}, family=self.family)


class LoRA(LayerMethod):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    class Options(LayerOptions):
        kind: Literal["lora"] = "lora"
        rslora: bool = Field(False, description="Multiply by alpha / √rank instead of alpha / rank, so that the step "
                             "does not shrink with the rank; give alpha too, as left out it is the rank, and the "
                             "factor √rank (Kalajdzievski 2023; peft's use_rslora).")
        dropout: float = Field(0.0, ge=0, lt=1, description="Probability of leaving out each input of a delta, in "
                               "training (the paper's code, peft's lora_dropout).")

    options: Options

    def make(self, choice: Choice, generator: torch.Generator) -> LowRank:
        from impasto.deltas.layers import shape_of
        from impasto.deltas.lowrank import LowRank

        delta = LowRank(shape_of(choice.layer), choice.rank, choice.alpha, rslora=self.options.rslora,
                        dropout=self.options.dropout)
        delta.initialise(generator)
        return delta


def _matches(base: Base, pattern: str, targets: list[str], option: str) -> list[str]:
    """The targeted layers that a pattern names; a `UserError` if there are none."""
    named = set(base.targets(pattern))
    if found := [path for path in targets if path in named]:
        return found
    raise UserError(f"{option}: {pattern!r} names no layer that is a target", fix="add it to targets, or leave it out")


def _by_pattern(base: Base, table: dict[str, Any], targets: list[str], option: str) -> dict[str, Any]:
    """The table's values by path: the first pattern that matches counts."""
    values: dict[str, Any] = {}
    for pattern, value in table.items():
        for path in _matches(base, pattern, targets, option):
            values.setdefault(path, value)
    return values
