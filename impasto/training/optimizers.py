"""Optimizers from their libraries. A new one is one entry of OPTIMIZERS; any other class goes by its import path."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from impasto.core.errors import MissingExtra, UserError, nearest

if TYPE_CHECKING:
    import torch

    from impasto.training.sections import TrainOptions

#: keys of [train] that are arguments of many optimizers
SHARED = ("betas", "weight_decay", "eps")
ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}
#: a third to a tenth of AdamW's rate, with as much more decay (Chen et al. 2023, arXiv:2302.06675)
LION: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.05}
#: schedules that fall once, or not at all
SMOOTH = ("cosine", "constant", "linear", "polynomial", "rex")


@dataclass(frozen=True)
class Entry:
    """One optimizer: its class, and how it is best used."""

    path: str
    about: str
    #: what the class is given beside the rate; the SHARED among them are the defaults of those keys of [train]
    settings: Mapping[str, Any]
    extra: str = ""
    rate: float = 1e-4  # recommended, and the default of train.learning_rate
    schedules: tuple[str, ...] = ()  # those it works with, the recommended one first; none named: all
    adaptive: bool = False  # finds its rate itself: its group's "d", which ours, one for all groups, is multiplied with
    fused: bool = False  # whether torch has fused kernels of it
    unpaged: str = ""  # the class where there is no CUDA, whose driver pages
    averages: bool = False  # trains at other weights than it answers for, in the way that shown.py knows

    @property
    def whole(self) -> bool:
        """Whether a step counts over all weights at once, so that they cannot take theirs one after the other."""
        return self.adaptive or self.averages


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry("torch.optim:AdamW", "AdamW.", ADAMW, fused=True),
    "adamw8bit": Entry("bitsandbytes.optim:AdamW8bit", "AdamW with its state in 8 bits, a quarter of the size.", ADAMW,
                       extra="8bit"),
    "paged_adamw8bit": Entry("bitsandbytes.optim:PagedAdamW8bit", "The same, and the state moves to the computer's "
                             "memory while the GPU's is short.", ADAMW, extra="8bit",
                             unpaged="bitsandbytes.optim:AdamW8bit"),
    "muon": Entry("impasto.training.muon:Muon", "Orthogonal momentum (Jordan et al. 2024): the better one where whole "
                  "networks are trained from random weights.", ADAMW),
    "lion": Entry("bitsandbytes.optim:Lion", "The momentum's sign: half of AdamW's state (Chen et al. 2023).", LION,
                  extra="8bit", rate=2e-5),
    "lion8bit": Entry("bitsandbytes.optim:Lion8bit", "Lion with its state in 8 bits.", LION, extra="8bit", rate=2e-5),
    # torch's own has a relative step and a scaling by the weights' size that cannot be turned off
    "adafactor": Entry("transformers.optimization:Adafactor", "Next to no state (Shazeer & Stern 2018), at the rate "
                       "that the recipe says: the relative step is off. It clips by itself (kohya: train.clip = 0).",
                       {"weight_decay": 0.0, "scale_parameter": False, "relative_step": False}),
    "prodigy": Entry("prodigyopt:Prodigy", "AdamW that finds its rate (Mishchenko & Defazio 2023), with diffusers' "
                     "settings: decoupled decay, bias correction, a warm-up that does not disturb it.",
                     {**ADAMW, "decouple": True, "use_bias_correction": True, "safeguard_warmup": True},
                     extra="prodigy", rate=1.0, schedules=SMOOTH, adaptive=True),
    "dadapt_adam": Entry("dadaptation:DAdaptAdam", "AdamW that finds its rate (Defazio & Mishchenko 2023); prodigy "
                         "came after it.", {**ADAMW, "decouple": True}, extra="dadapt", rate=1.0, schedules=SMOOTH,
                         adaptive=True),
    "dadapt_lion": Entry("dadaptation:DAdaptLion", "Lion that finds its rate; experimental, say its authors.",
                         {"betas": (0.9, 0.99), "weight_decay": 0.01}, extra="dadapt", rate=1.0, schedules=SMOOTH,
                         adaptive=True),
    "schedulefree_adamw": Entry("schedulefree:AdamWScheduleFree", "AdamW whose average takes the place of a schedule "
                                "(Defazio et al. 2024); it bears up to 10 times AdamW's rate, and wants a warm-up. "
                                "Previews and artifacts show the average.", ADAMW, extra="schedulefree",
                                schedules=("constant",), averages=True),
    "sgd": Entry("torch.optim:SGD", "Plain gradient descent; momentum is an option.", {"weight_decay": 0.0}),
}

ADAPTIVE = {entry.path.partition(":")[2] for entry in OPTIMIZERS.values() if entry.adaptive}
#: classes that train at other weights than they answer for, in the way that shown.py knows
SCHEDULE_FREE = {"AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"}


def make_optimizer(groups: list[dict[str, Any]], options: TrainOptions, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimizer over parameter groups, of which each keeps its rate as "base_lr".

    A group's "lr" of None means train.learning_rate; a "ratio" is what its rate is multiplied by (LoRA+). Raises
    `UserError` for options that the class does not take, and for groups of different rates where it takes only one.
    """
    cls, settings = choose(options, device)
    made = [{key: value for key, value in group.items() if key != "paths"} for group in groups]
    for group in made:
        group["lr"] = group["base_lr"] = (group.get("lr") or options.learning_rate) * group.pop("ratio", 1)
    entry = OPTIMIZERS.get(options.optimizer)
    if entry is not None and entry.adaptive and len(rates := {group["base_lr"] for group in made}) > 1:
        raise UserError(f"{options.optimizer} finds the rate itself and takes one for all that is trained, not "
                        + " and ".join(f"{rate:g}" for rate in sorted(rates)), where="train.optimizer",
                        fix="leave out train.rates and the methods' own rates and ratios")
    return _built(cls, made, settings, options.optimizer)


def choose(options: TrainOptions, device: torch.device) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and its arguments, before there is anything to optimize.

    Raises `UserError`: its library is missing, an option is not known to it, or a class by import path does not come
    back from a checkpoint bit for bit.
    """
    name, entry = options.optimizer, OPTIMIZERS.get(options.optimizer)
    path = name if entry is None else entry.unpaged if entry.unpaged and device.type != "cuda" else entry.path
    cls = _load(path, entry.extra if entry else "")
    if cls.__module__.startswith("bitsandbytes") and device.type == "mps":
        raise UserError("bitsandbytes has no optimizers for mps", where="train.optimizer", fix="use adamw")
    taken = inspect.signature(cls).parameters
    settings = dict(entry.settings) if entry else {}
    if entry is not None and entry.fused:
        settings["fused"] = device.type in ("cuda", "cpu", "mps")  # lowest peak memory
    shared = {key: value for key in SHARED if (value := getattr(options, key)) is not None}
    for key, value in {**shared, **options.optimizer_options}.items():
        if key in ("lr", "params") or key not in taken and not _takes_anything(taken):
            raise _unknown(name, key, taken)
        settings[key] = tuple(value) if isinstance(value, list) else value
    if "lr" in taken:
        settings["lr"] = options.learning_rate
    if entry is None:
        from impasto.training.optimizer_state import check_resume

        check_resume(lambda parameters: _built(cls, [{"params": parameters}], settings, name), name, device)
    return cls, settings


def remarks(options: TrainOptions, optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each thing that is set otherwise than the optimizer's authors have it."""
    entry, lines = OPTIMIZERS.get(options.optimizer), []
    if entry is None:
        return lines
    if entry.adaptive and (rate := optimizer.param_groups[0]["base_lr"]) != entry.rate:
        lines.append(f"{options.optimizer} finds the rate itself, and {rate:g} is what that is multiplied with: "
                     f"train.learning_rate = {entry.rate:g} is its authors' advice")
    if entry.schedules and options.schedule not in entry.schedules:
        lines.append(f"{options.optimizer} is not made for train.schedule = {options.schedule}: "
                     f"{entry.schedules[0]} is its authors' advice")
    return lines


def effective_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the first group, times what an adaptive optimizer has found."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * (group["d"] if type(optimizer).__name__ in ADAPTIVE else 1))


def _load(path: str, extra: str) -> type[torch.optim.Optimizer]:
    """The class at "package.module:Class"; a missing library is named, with the extra that brings it."""
    import torch  # not above: a recipe, which knows the names, is checked without it

    module, _, attribute = path.partition(":")
    package = module.partition(".")[0]
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        if extra:
            raise MissingExtra(package, extra) from None
        raise UserError(f"{module} cannot be imported ({error})", where="train.optimizer",
                        fix=f"install the package that has it, or take one of: {', '.join(OPTIMIZERS)}") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"{path} is no optimizer class", where="train.optimizer",
                        fix="say package.module:Class, a subclass of torch.optim.Optimizer")
    if hasattr(found, "eval") and not (package == "schedulefree" and found.__name__ in SCHEDULE_FREE):
        raise UserError(f"{path} trains at other weights than it answers for, in a way that is not known here",
                        where="train.optimizer", fix="of this kind there is schedulefree_adamw")
    return found


def _built(cls: Any, groups: list[dict[str, Any]], settings: dict[str, Any], name: str) -> torch.optim.Optimizer:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some print, and what we print may be JSON
            optimizer = cls(groups, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{name} refuses its options ({error})", where="train.optimizer_options") from None
    if cls.__name__ in SCHEDULE_FREE:
        optimizer.train()  # there is no state yet, hence nothing moves; shown.py does what eval() would
    return optimizer


def _takes_anything(taken: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def _unknown(name: str, key: str, taken: Mapping[str, inspect.Parameter]) -> UserError:
    known = [option for option in taken if option not in ("params", "lr")]
    where = f"train.{key}" if key in SHARED else "train.optimizer_options"
    if key == "lr":
        return UserError("the rate is train.learning_rate", where=where, fix="leave lr out")
    hint = nearest(key, known)
    return UserError(f"{name} takes no {key!r}", where=where, fix=f"{hint if hint.startswith('did') else ''} "
                     f"it takes: {', '.join(known)}".strip())
