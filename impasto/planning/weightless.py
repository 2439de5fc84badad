"""A base of shapes alone, and what lets methods and codecs work on it: what a run leaves is then known beforehand.

Its networks are on the meta device, where a tensor has a shape and a type, and no values. Methods put their weights
onto it as onto any base; codecs arrange these into files. Where they look at values, `Valueless` answers for these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from impasto.families import FAMILIES
from impasto.families.base import Base
from impasto.families.load import load_base, locate
from impasto.formats.checkpoint import Checkpoint, open_checkpoint
from impasto.formats.configs import CONFIGS, FamilyConfig
from impasto.formats.source import Source
from impasto.planning.faking import is_there
from impasto.training.recipe import BaseOptions, Recipe

#: draws of initial values, which nobody needs here
DRAWS = (torch.rand, torch.randn)


class Valueless(TorchFunctionMode):
    """A block in which tensors on the meta device pass every look at their values, and stay where they are.

    All are finite and within bounds, as those of a training that went well; their bytes, of which nothing but digests
    is made, are none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            return func(*args, device="meta")
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is Tensor.__bool__:
                return True
            if func is Tensor.cpu:
                return args[0]
            if func in (torch.equal, Tensor.equal):  # what was trained apart has come apart
                return args[0] is args[1]
            if func is Tensor.numpy:
                return np.zeros(0, np.uint8)
        return func(*args, **kwargs)


def weightless_base(options: BaseOptions, dtype: torch.dtype = torch.float32) -> Base:
    """The base that a recipe names, from its header or its configurations alone. Raises `UserError` as loading does.

    Adapters are not merged into it, which changes no shape.
    """
    assert options.path is not None, "a base without a file is `published_base`"
    with torch.device("meta"):
        base = load_base(options.path, family=options.family, vae=options.vae, device="meta", dtype=dtype,
                         prediction=options.prediction, clip_skip=options.clip_skip, init_seed=0,
                         text_encoders=options.text_encoders, options=options.options)
    if options.init == "weights":  # then there are values, though they are not here
        base.checkpoints = dict.fromkeys(base.components, open_checkpoint(locate(options.path), weights=False))
    return base


def published_base(family: str, dtype: torch.dtype = torch.float32) -> Base:
    """The base of a family as its authors published it, without any file."""
    table: FamilyConfig = CONFIGS.get(family)
    nothing: Any = None  # in the place of a file
    told = {"prediction_type": "epsilon"} if "unet" in table.parts else {}  # SD 2's configurations do not say
    checkpoint = Checkpoint(
        path=Path(family), family=family, layout="", scheduler={**told, **table.scheduler},
        configs={name: dict(part.config) for name, part in table.parts.items()},
        sources={name: Source(nothing, {}) for name in table.parts})
    with torch.device("meta"):
        base: Base = FAMILIES.get(family).from_checkpoints(dict.fromkeys(table.parts, checkpoint), device="meta",
                                                           dtype=dtype, init_seed=0)
    base.checkpoints = dict.fromkeys(base.components, checkpoint)
    return base


def planned_base(recipe: Recipe) -> Base:
    """The base of a recipe to plan, which need not be there if its family is named; halves where it trains halves."""
    dtype = torch.bfloat16 if any(getattr(options, "weights", "") == "bf16" for options in recipe.method) \
        else torch.float32
    if recipe.base.path is None or recipe.base.family is not None and not is_there(recipe.base.path):
        assert recipe.base.family is not None, "a recipe has one of both"
        return published_base(recipe.base.family, dtype)
    return weightless_base(recipe.base, dtype)
