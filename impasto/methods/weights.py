"""Methods that train a delta on each of some chosen layers: LoRA, and what is built like it.

Such a method is its options and one `make`: which layers, which rank and alpha in each, DoRA's magnitudes, a warm
start, parameter groups and rates, rest, largest norm and the adapter are the same for all.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from impasto.core.counts import check_steps, steps_of
from impasto.core.errors import UserError
from impasto.core.weighted import checked
from impasto.methods.base import Method, MethodOptions, switched_off
from impasto.methods.norms import limit
from impasto.methods.warm import read_start, take_over

if TYPE_CHECKING:
    import torch
    from torch import nn

    from impasto.deltas.adapter import Adapter
    from impasto.deltas.attach import Attachment
    from impasto.deltas.delta import Delta
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
    text_encoder_stop: int | float | None = Field(
        None, gt=0, description="Steps after which the text encoders' deltas stay as they are; a share of all steps if "
        "less than 1; default: never (kohya's stop_text_encoder_training).")
    loraplus_ratio: float | None = Field(
        None, gt=0, description="LoRA+: the factor that begins at zero has so many times the rate (Hayou et al. 2024 "
        "advise 16; kohya's loraplus_lr_ratio). Of lora alone, as in kohya and LyCORIS.")
    text_encoder_loraplus_ratio: float | None = Field(
        None, gt=0, description="The same in the text encoders; default: loraplus_ratio "
        "(kohya's loraplus_text_encoder_lr_ratio).")
    dora: bool = Field(False, description="DoRA: the length of each row of the weight is trained by itself, and the "
                       "delta turns it (Liu et al. 2024; LyCORIS' dora_wd, peft's use_dora).")
    dora_axis: Literal["output", "input"] = Field(
        "output", description="Whose lengths these are: of each output (the paper, peft; LyCORIS' wd_on_output) or of "
        "each input, which is the older of LyCORIS' two.")
    warm_start: Annotated[str, pydantic.AfterValidator(checked)] | None = Field(
        None, description="FILE or FILE:strength: an adapter to begin with, of any format (kohya's network_weights). "
        "A layer that it lacks begins anew.")
    max_norm: float | None = Field(
        None, gt=0, description="Largest Frobenius norm of each layer's delta, kept to after every step (kohya's "
        "scale_weight_norms, for which 1 is advised).")

    @pydantic.field_validator("text_encoder_stop")
    @classmethod
    def _steps_or_share(cls, value: float | None) -> float | None:
        check_steps(value)
        return value


@dataclass(frozen=True)
class Choice:
    """A layer to train, and the size of its delta."""

    layer: nn.Module
    rank: int
    alpha: float


class LayerMethod(Method):
    """Trains one delta on each chosen layer, in fp32."""

    options: LayerOptions
    #: factors that begin at zero, for which LoRA+ has a rate of their own; kohya and LyCORIS know LoRA's `up` alone
    plus: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: LayerOptions) -> None:
        super().__init__(options)
        self.deltas: dict[str, Delta] = {}
        self.family = ""
        self.text: dict[str, Delta] = {}  # those of text encoders
        self.stop: int | None = None  # the step from which these rest

    @abc.abstractmethod
    def make(self, choice: Choice, generator: torch.Generator) -> Delta:
        """A new delta of a layer: initial values, drawn from `generator` (on the CPU), leave the base as it is."""

    def uses_rank(self) -> bool:
        """Whether a rank says anything beside 0, which leaves a layer out: then it can be too large for a layer."""
        return True

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
            if rank > largest and self.uses_rank():
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

    def check(self, base: Base) -> None:
        self._check_text_options(base, chosen := self.choose(base))
        if self.options.warm_start is not None:
            read_start(self.options.warm_start, base, chosen)

    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        """Attach a new delta to each chosen layer; a parameter group for each component of the base, two by LoRA+."""
        import torch

        from impasto.core.rng import generator
        from impasto.deltas.attach import attach
        from impasto.deltas.layers import device_of

        self.family, options = base.family, self.options
        self._check_text_options(base, chosen := self.choose(base))
        start = read_start(options.warm_start, base, chosen) if options.warm_start is not None else {}
        for path, choice in chosen.items():
            with torch.device(device_of(choice.layer) or base.device):
                delta = self.make(choice, generator(seed, "init", path))
                self.deltas[path] = self._begun(delta, choice, path, start.get(path, ()))
        self.text = {path: delta for path, delta in self.deltas.items()
                     if path.partition(".")[0] in base.text_encoder_names}
        self.attachment: Attachment = attach(base.components, self.deltas)
        return self._groups()

    def _check_text_options(self, base: Base, chosen: Iterable[str]) -> None:
        """Raises `UserError` for options of text encoders where none of these is trained, and for those of LoRA+."""
        if self.options.loraplus_ratio is not None or self.options.text_encoder_loraplus_ratio is not None:
            if not self.plus:
                raise UserError(f"a {self.options.kind} has no factor that LoRA+ would give a rate of its own",
                                where=f"method {self.options.kind}: loraplus_ratio", fix="leave it out")
        if {path.partition(".")[0] for path in chosen} & set(base.text_encoder_names):
            return
        for key in ("text_encoder_learning_rate", "text_encoder_stop", "text_encoder_loraplus_ratio"):
            if getattr(self.options, key) is not None:
                raise UserError("no layer of a text encoder is trained", where=f"method {self.options.kind}: {key}",
                                fix="add \"text-encoder\" to targets, or leave it out")

    def _begun(self, delta: Delta, choice: Choice, path: str, terms: tuple[Delta, ...]) -> Delta:
        """The delta as it begins: as the terms of a warm start, with DoRA's magnitude around it."""
        from impasto.deltas.dora import Dora
        from impasto.deltas.layers import weight_of

        dora = terms[0] if len(terms) == 1 and isinstance(terms[0], Dora) else None
        if dora is not None and not self.options.dora:
            raise UserError("the warm start is a DoRA there, whose magnitudes would be lost", where=path,
                            fix="dora = true trains them on")
        if terms:
            take_over(delta, terms if dora is None else (dora.inner,), path)
        if not self.options.dora:
            return delta
        made = Dora.of(delta, weight_of(choice.layer), "out" if self.options.dora_axis == "output" else "in")
        if dora is not None:
            if dora.magnitude.shape != made.magnitude.shape:
                raise UserError("the warm start has magnitudes along the other axis there", where=path,
                                fix="choose the other dora_axis")
            made.magnitude.data.copy_(dora.magnitude)
        return made

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters by component and, with LoRA+, by which factor they are."""
        options = self.options
        made: dict[str, dict[str, Any]] = {}
        for path, delta in self.deltas.items():
            component, text = path.partition(".")[0], path in self.text
            lr = options.text_encoder_learning_rate if text else None
            ratio = options.text_encoder_loraplus_ratio if text else None
            ratio = options.loraplus_ratio if ratio is None else ratio
            for name, parameter in delta.named_parameters(prefix=path):
                plus = ratio is not None and name.rpartition(".")[2] in self.plus
                title = f"{options.kind} {component}" + " plus" * plus
                group = made.setdefault(title, {
                    "params": [], "paths": [], "lr": options.learning_rate if lr is None else lr, "name": title,
                    **({"ratio": ratio} if plus else {})})
                group["params"].append(parameter)
                group["paths"].append(name)
        return list(made.values())

    def modules(self) -> dict[str, nn.Module]:
        """The deltas, by layer path."""
        return dict(self.deltas)

    def trains(self, base: Base) -> frozenset[str]:
        return frozenset(path.partition(".")[0] for path in self.choose(base))

    def off(self) -> AbstractContextManager[None]:
        return switched_off(self.attachment)

    def begin(self, total: int) -> None:
        if self.options.text_encoder_stop is not None:
            self.stop = steps_of(self.options.text_encoder_stop, total)

    def _text_rests(self, step: int) -> bool:
        return self.stop is not None and step >= self.stop

    def resting(self, step: int) -> Iterable[nn.Parameter]:
        """The text encoders' deltas, from `text_encoder_stop` on."""
        resting = self.text if self._text_rests(step) else {}
        return [parameter for delta in resting.values() for parameter in delta.parameters()]

    def after_step(self, step: int) -> None:
        """Keep to the largest norm: of a DoRA, that of the delta inside it, as LyCORIS has it."""
        from impasto.deltas.dora import Dora

        if self.options.max_norm is None:
            return
        rests = self._text_rests(step)
        for path, delta in self.deltas.items():
            if not (rests and path in self.text):
                limit(delta.inner if isinstance(delta, Dora) else delta, self.options.max_norm)

    def adapter(self) -> Adapter:
        from impasto.deltas.adapter import Adapter

        return Adapter({path: (delta.snapshot(),) for path, delta in self.deltas.items()}, family=self.family)


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
