"""What peft's configs say of the tensors beside them, and the config that says it of ours.

In a folder of peft's the tensors tell the factors, and `adapter_config.json` the scale: alpha / r, or alpha / √r if
rank-stabilised. A config describes one kind of change for all its layers (`peft_type`), with what differs among them by
patterns; for LoKr it tells how peft is to split the layers, by rules that not every file follows.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from impasto.core.errors import UserError
from impasto.deltas.kronecker import factorization
from impasto.formats.kronecker_split import factor_of, split_of
from impasto.formats.names import kernel
from impasto.formats.parts import Parts, rank_in

#: no one means more; a number from a file may have any size
MAX_ALPHA = 1e9

#: peft_type -> the kind of its parts, and the key of its alpha
TYPES = {"LORA": ("lora", "lora_alpha"), "LOHA": ("loha", "alpha"), "LOKR": ("lokr", "alpha")}


# --- reading -----------------------------------------------------------------------------------------------


def with_alpha(component: str, path: str, parts: Parts, config: Mapping[str, Any], where: Path) -> Parts:
    """The parts with the alpha that the config gives the layer, if the file's tensors do not have one.

    peft's scale counts for a LoKr of whole factors too, where alpha means nothing to others: it is multiplied in.
    """
    layer = f"{component}.{path}"
    for unsupported in ("fan_in_fan_out", "use_qalora", "lora_bias"):
        if config.get(unsupported):
            raise UserError(f"its config says {unsupported}, which is not supported", where=where)
    key = next((key for key in ("lora_alpha", "alpha") if key in config), None)
    if "alpha" in parts or key is None:
        return parts
    alpha = _in_pattern("alpha_pattern", config, path, config[key], where)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
        raise UserError(f"its config gives {layer} the alpha {str(alpha)[:40]!r}", where=where)
    if {"lokr.w1", "lokr.w2"} <= parts.keys():
        rank = _in_pattern("rank_pattern", config, path, config.get("r"), where)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_ALPHA:
            raise UserError(f"its config gives {layer} the rank {str(rank)[:40]!r}", where=where)
        return parts if alpha == rank else parts | {"lokr.w1": parts["lokr.w1"] * (alpha / rank)}
    if config.get("use_rslora"):  # peft divides by √rank then, and this alpha is divided by the rank
        alpha *= math.sqrt(rank_in(parts))
    return parts | {"alpha": torch.tensor(float(alpha), dtype=torch.float64)}


def _in_pattern(name: str, config: Mapping[str, Any], path: str, default: Any, where: Path) -> Any:
    """What a table of patterns gives a layer: the first that fits counts."""
    table = config.get(name) or {}
    if not isinstance(table, dict):
        raise UserError(f"{name} in its config is not a table", where=where)
    return next((value for pattern, value in table.items() if _matches(name, pattern, path, where)), default)


def _matches(name: str, pattern: str, path: str, where: Path) -> bool:
    """peft's rule: a pattern is a regular expression for the path's end, from its start or after a dot."""
    if len(re.findall(r"[*+?{]", pattern)) > 4 or re.search(r"\)[*+?{]", pattern):
        raise UserError(f"{name} {pattern!r} is too intricate to be matched safely", where=where)
    try:
        expression = re.compile(rf"(.*\.)?({pattern})")
    except re.error:
        raise UserError(f"{name} {pattern!r} is not a regular expression", where=where) from None
    # a pattern may have been written for a text encoder with `text_model.` in its paths, or without
    return any(expression.fullmatch(p) for p in {path, path.removeprefix("text_model.")})


def json_table(text: str, what: str, where: Path) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise UserError(f"{what} is not a table in JSON", where=where)
    return table


# --- writing -----------------------------------------------------------------------------------------------


def config_of(component: str, layers: Mapping[str, Parts], where: Path) -> dict[str, Any]:
    """peft's config of a component's layers. Raises `UserError` where peft's rules do not make these factors.

    Patterns leave `text_model.` out: they are matched against the end of a module's path, which has it or not with the
    version of transformers.
    """
    kinds = {next(part.partition(".")[0] for part in parts if "." in part) for parts in layers.values()}
    if len(kinds) > 1:
        raise UserError(f"{component} holds {' and '.join(sorted(kinds))}, and a peft folder one kind", where=where,
                        fix="save it as kohya, which holds a kind for each layer")
    (kind,) = kinds
    if kind == "lora":
        return _lora(component, layers, where)
    specific = {"loha": _loha, "lokr": _lokr}[kind](component, layers, where)
    ranks = {path: _rank(parts) for path, parts in layers.items()}
    alphas = {path: _whole(float(parts["alpha"])) if rank_in(parts) else ranks[path]
              for path, parts in layers.items()}
    return {**_tables(ranks, alphas, "alpha"), **specific, "peft_type": kind.upper(), "rank_dropout": 0.0,
            "module_dropout": 0.0, "init_weights": True}


def _rank(parts: Parts) -> int:
    """The rank that peft is told: of whole factors one that has peft make them whole."""
    if rank := rank_in(parts):
        return rank
    return max(1, math.ceil(max(parts["lokr.w2"].shape[:2]) / 2), math.ceil(max(parts["lokr.w1"].shape) / 2))


def _tables(ranks: Mapping[str, int], alphas: Mapping[str, float], key: str) -> dict[str, Any]:
    """The usual rank and alpha, and what differs from them."""
    ranks = {path.removeprefix("text_model."): value for path, value in ranks.items()}
    alphas = {path.removeprefix("text_model."): value for path, value in alphas.items()}
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    return {"r": rank, key: alpha, "target_modules": sorted(ranks),
            "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
            "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha}}


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _lora(component: str, layers: Mapping[str, Parts], where: Path) -> dict[str, Any]:
    dora = {"magnitude" in parts for parts in layers.values()}
    if len(dora) > 1:
        raise UserError(f"{component} holds DoRA in some layers and plain LoRA in others, and peft's files say "
                        "use_dora for all", where=where, fix="save it as kohya, which holds a kind for each layer")
    ranks = {path: rank_in(parts) for path, parts in layers.items()}
    alphas = {path: _whole(float(parts["alpha"])) for path, parts in layers.items()}
    return {**_tables(ranks, alphas, "lora_alpha"), "peft_type": "LORA", "use_rslora": False, "use_dora": dora.pop(),
            "bias": "none", "lora_dropout": 0.0}


def _loha(component: str, layers: Mapping[str, Parts], where: Path) -> dict[str, Any]:
    return {"use_effective_conv2d": _effective(component, layers, "loha.t1", where)}


def _effective(component: str, layers: Mapping[str, Parts], core: str, where: Path) -> bool:
    """Whether kernels have Tucker cores: peft has them in all convolutions of more than 1×1, or in none."""
    cores = {core in parts for path, parts in layers.items() if _has_kernel(component, path, parts, core)}
    if len(cores) > 1:
        raise UserError(f"{component} holds Tucker cores in some convolutions and none in others, and peft's config "
                        "says one thing for all", where=where, fix="save it as kohya")
    return cores == {True}


def _has_kernel(component: str, path: str, parts: Parts, core: str) -> bool:
    return core in parts or math.prod(kernel(f"{component}.{path}")) > 1 and "lokr.w2" not in parts


def _lokr(component: str, layers: Mapping[str, Parts], where: Path) -> dict[str, Any]:
    """The factor that has peft split every layer as these are split."""
    splits = {path: split_of(f"{component}.{path}", parts) for path, parts in layers.items()}
    if (factor := factor_of(splits.values(), _factorization)) is None:
        raise UserError(f"{component} holds LoKr layers that no decompose_factor of peft splits like this", where=where,
                        fix="save it as kohya, which holds them as they are")
    both = any("lokr.w1_a" in parts for parts in layers.values())
    for path, parts in layers.items():
        (o1, i1), (o2, i2) = splits[path]
        rank = _rank(parts)
        fits = ("lokr.w2" in parts) == (rank >= max(o2, i2) / 2) and \
            ("lokr.w1_a" in parts) == (both and rank < max(o1, i1) / 2)
        if not fits:
            raise UserError(f"{component}.{path} has whole LoKr factors where peft makes products at rank {rank}, or "
                            "the other way round", where=where, fix="save it as kohya, which holds them as they are")
    return {"decompose_both": both, "decompose_factor": factor,
            "use_effective_conv2d": _effective(component, layers, "lokr.t2", where)}


def _factorization(size: int, factor: int) -> tuple[int, int]:
    """As peft splits a layer's side: a factor that divides it comes first, whichever is larger."""
    return (factor, size // factor) if factor > 0 and size % factor == 0 else factorization(size, factor)


def fold(parts: Parts, dtype: torch.dtype) -> Parts:
    """A LoRA's alpha made equal to the rank, if alpha / rank is a power of two and `dtype` has room for it.

    Room: what drops below the smallest numbers of `dtype` is less than 1e-5 of each factor's norm, a fiftieth
    of fp16's own rounding.
    """
    up, down, rank = parts["lora.up"], parts["lora.down"], rank_in(parts)
    mantissa, exponent = math.frexp(float(parts["alpha"]) / rank)
    if mantissa != 0.5 or exponent == 1:
        return parts
    half = (exponent - 1) // 2
    shifts = half, exponent - 1 - half
    for old, shift in zip((down, up), shifts, strict=True):
        stays = (old * 2.0**shift).to(dtype).float() / 2.0**shift
        if not (stays - old.to(dtype).float()).norm() <= 1e-5 * old.norm():
            return parts
    return parts | {"lora.up": up * 2.0**shifts[1], "lora.down": down * 2.0**shifts[0],
                    "alpha": torch.tensor(float(rank), dtype=torch.float64)}
