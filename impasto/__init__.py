"""Impasto fine-tunes Stable Diffusion. The public names, each imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from impasto.core.errors import UserError as UserError
    from impasto.deltas.adapter import Adapter as Adapter
    from impasto.families.apply import apply as apply
    from impasto.families.load import load_base as load_base
    from impasto.families.sample_settings import SampleSettings as SampleSettings
    from impasto.families.sampling import sample as sample
    from impasto.formats.adapters import load_adapter as load_adapter
    from impasto.formats.adapters import save_adapter as save_adapter
    from impasto.toolbox.extract import extract as extract
    from impasto.training.recipe import Recipe as Recipe
    from impasto.training.recipe import load_recipe as load_recipe
    from impasto.training.trainer import train as train

__version__ = "0.1.0"

#: public name -> its module
_PUBLIC = {
    "Adapter": "impasto.deltas.adapter",
    "Recipe": "impasto.training.recipe",
    "SampleSettings": "impasto.families.sample_settings",
    "UserError": "impasto.core.errors",
    "apply": "impasto.families.apply",
    "extract": "impasto.toolbox.extract",
    "load_adapter": "impasto.formats.adapters",
    "load_base": "impasto.families.load",
    "load_recipe": "impasto.training.recipe",
    "sample": "impasto.families.sampling",
    "save_adapter": "impasto.formats.adapters",
    "train": "impasto.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'impasto' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
