"""The learning rate: a function of the step, and of where in the base a parameter is."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from impasto.core.counts import steps_of
from impasto.core.errors import UserError
from impasto.training.sections import TrainOptions

#: cosines in a run, and the power of a polynomial, where the recipe does not say
RESTARTS, POWER = 3, 2.0


def rate_factor(step: int, total: int, options: TrainOptions) -> float:
    """What the base rate is multiplied by at optimizer step `step` (from 0) of `total`.

    Linear warm-up, then the schedule (transformers' get_scheduler, whose first step after no warm-up has the full
    rate); one_cycle rises by itself.
    """
    warmup = steps_of(options.warmup, total)
    if options.schedule == "one_cycle":
        return _one_cycle(step, total, warmup or 0.3 * total - 1)
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    match options.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "cosine_with_restarts":
            return 0.5 * (1 + math.cos(math.pi * (done * (options.restarts or RESTARTS) % 1))) if done < 1 else 0.0
        case "linear":
            return 1 - done
        case "polynomial":
            return (1 - done) ** (options.power or POWER)
        case "rex":  # Chen et al. 2021, arXiv:2107.04197
            return (1 - done) / (0.5 + 0.5 * (1 - done))


def _one_cycle(step: int, total: int, top: float) -> float:
    """Half a cosine from 1/25 up to 1 at step `top`, and another down to 1/250,000 at the last (torch's OneCycleLR)."""
    start, end = 1 / 25, 1 / 25e4
    if step <= top:
        return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / top)) if top else 1.0
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - top) / max(total - 1 - top, 1e-9))))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def split_by_path(groups: list[dict[str, Any]], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups cut so that every parameter has the rate of the first pattern that is found in its path.

    A group's "paths" are those of its "params"; without them its "name" stands for each. Where no pattern is found
    the group's own rate stays. Raises `UserError` for a pattern that is no regular expression or has no effect.
    """
    if not rates:
        return groups
    patterns = [_compiled(pattern) for pattern in rates]
    made: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[str | None, list[int]] = {}
        for i, path in enumerate(_paths(group)):
            parts.setdefault(next((p.pattern for p in patterns if p.search(path)), None), []).append(i)
        for pattern, places in parts.items():
            part = {**group, **{key: [group[key][i] for i in places] for key in ("params", "paths") if key in group}}
            if pattern is not None:
                part |= {"lr": rates[pattern], "name": f"{group['name']} {pattern}", "pattern": pattern}
            made.append(part)
    used = {part.pop("pattern", None) for part in made}
    for pattern in patterns:
        if pattern.pattern not in used:
            raise _without_effect(pattern, [path for group in groups for path in _paths(group)])
    return made


def _paths(group: dict[str, Any]) -> list[str]:
    return group.get("paths") or [group["name"]] * len(group["params"])


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression ({error})", where="train.rates") from None


def _without_effect(pattern: re.Pattern[str], paths: list[str]) -> UserError:
    if any(pattern.search(path) for path in paths):
        return UserError(f"{pattern.pattern!r} names only what patterns before it have taken", where="train.rates",
                         fix="put it before them, or leave it out")
    known = list(dict.fromkeys(start for path in paths for start in _starts(path)))
    plain = re.sub(r"\[\.\]|\\\.", ".", pattern.pattern)
    close = difflib.get_close_matches(plain, known, n=3, cutoff=0.6) or known[:3]
    return UserError(f"{pattern.pattern!r} names nothing that is trained", where="train.rates",
                     fix="there is " + ", ".join(close))


def _starts(path: str) -> Iterable[str]:
    """a, a.b, a.b.c of a.b.c, and each part by itself."""
    parts = path.split(".")
    return [*(".".join(parts[:n]) for n in range(1, len(parts) + 1)), *parts]
