"""Arguments that other trainers pass on to an optimizer's class: those that the class of the same name here takes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from impasto.training.foreign.engine import Work

#: optimizer -> arguments of its class, beside those that are keys of [train]
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("amsgrad",),
    "adamw8bit": ("min_8bit_size",), "paged_adamw8bit": ("min_8bit_size",),
    "lion8bit": ("min_8bit_size",),
    "adafactor": ("scale_parameter", "clip_threshold", "decay_rate", "beta1"),
    "prodigy": ("d_coef", "d0", "growth_rate", "beta3", "decouple", "use_bias_correction", "safeguard_warmup",
                "slice_p"),
    "dadapt_adam": ("d0", "growth_rate", "decouple", "use_bias_correction"),
    "dadapt_lion": ("d0",),
    "schedulefree_adamw": ("r", "weight_lr_power"),
    "sgd": ("momentum", "dampening", "nesterov"),
}

#: what those classes do by themselves, where it is otherwise here
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "adafactor": {"scale_parameter": True},
    "prodigy": {"use_bias_correction": False, "safeguard_warmup": False},
    "dadapt_adam": {"decouple": False},
}


def pass_on(work: Work, optimizer: str, prefix: str, defaults: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """Put the settings under `prefix` that `optimizer` takes into train.optimizer_options, and `defaults`, what it has
    where they say nothing. Other settings stay to be told of by the table."""
    found: dict[str, Any] = dict(defaults.get(optimizer, {}))
    keys = []
    for name in ARGUMENTS.get(optimizer, ()):
        value = work.get(f"{prefix}{name}")
        if value is not None and (value := _read(value)) is not None:
            found[name] = value
            keys.append(f"{prefix}{name}")
    if found:
        work.put("train.optimizer_options", found, *keys, why="with the library's own defaults" if defaults else "")


def _read(value: Any) -> int | float | bool | None:
    """A number or a truth, also as Python writes it in a text; None for anything else."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, bool | int | float) and value == value and abs(value) != float("inf") else None
