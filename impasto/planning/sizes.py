"""The bytes of what a run leaves, before it runs: by shapes alone, through the codecs that will write it.

Tensors' bytes are exact. So is the header where the recipe runs on this machine: of what a file tells of its making,
fingerprints and hashes have always the same length, and the rest is known. Where the number of steps is not, because
`train.epochs` counts pictures that nobody has looked at, it is taken to have three digits.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.families.base import Base, Merged
from impasto.families.difference import layers_of
from impasto.families.save import folder_sizes
from impasto.formats.adapter_bytes import Taken
from impasto.formats.arrangement import arranged_sizes
from impasto.methods import METHODS
from impasto.methods.base import Method, check_method
from impasto.planning.hollow import build
from impasto.planning.known import told
from impasto.planning.valueless import Valueless
from impasto.training.environment import DTYPES, choose_device, describe
from impasto.training.metadata import metadata
from impasto.training.native import at_native_size
from impasto.training.recipe import BaseOptions, Recipe
from impasto.training.sections import DEFAULT_STEPS

#: of hexadecimal digests: of a component's weights, of an adapter's file, of the data
FINGERPRINT, DIGEST, DATA = "0" * 32, "0" * 32, "0" * 40


def shapes(options: BaseOptions, dtype: torch.dtype = torch.float32) -> Base:
    """A recipe's base on the meta device. How frozen weights are held changes nothing in what a run leaves."""
    whole = options.model_copy(update={"quantize": "none", "quantize_text": "none"})
    return build(told(options), whole, dtype, "meta")


def artifact_bytes(recipe: Recipe, base: Base | None = None) -> int:
    """All files of a run's artifact together; see `artifact_sizes`."""
    return sum(sum(size) for size in artifact_sizes(recipe, base).values())


def artifact_sizes(recipe: Recipe, base: Base | None = None) -> dict[Path, Taken]:
    """What the run of a recipe leaves at its end, by file.

    `base`: one without weights that is already there, in which nothing trains; methods are put onto it. Raises
    `UserError` for a base that cannot be opened, methods that do not fit it, and a format that cannot hold them.
    """
    if base is None:
        half = any(getattr(options, "weights", "") == "bf16" for options in recipe.method)
        base = shapes(recipe.base, torch.bfloat16 if half else torch.float32)
    recipe = at_native_size(recipe) if base.source is not None and base.source.exists() else recipe
    output, dtype = recipe.output, DTYPES[recipe.output.dtype]
    methods: list[Method] = [METHODS.get(options.kind)(options) for options in recipe.method]
    path, tells = _path(recipe, methods), _tells(recipe, base)
    with Valueless():
        for method in methods:
            check_method(method, base)
            method.prepare(base, recipe.train.seed)
        adapters = [adapter for method in methods if (adapter := method.adapter()) is not None]
        if output.format == "delta":
            adapters.append(_changes(base))
        if not adapters:
            return folder_sizes(base, path, dtype=dtype, metadata=tells)
        adapter = replace(functools.reduce(operator.add, adapters), family=base.family, base=_fingerprints(base))
        return arranged_sizes(adapter, path, dtype=dtype, metadata=tells,
                              format="auto" if output.format == "delta" else output.format)


def _path(recipe: Recipe, methods: Sequence[Method]) -> Path:
    """Where the artifact goes (as `Artifacts.path` has it)."""
    folder = Path(recipe.output.dir)
    name = recipe.output.name or folder.absolute().name
    if any(method.in_place for method in methods) and recipe.output.format != "delta":
        return folder / name
    suffixes = {method.suffix for method in methods}
    return folder / (name + (suffixes.pop() if len(suffixes) == 1 else ".safetensors"))


def _changes(base: Base) -> Adapter:
    """What `difference` will make of trained weights."""
    return Adapter({path: (Dense.from_weight(leaves.get("weight"), leaves.get("bias")),)
                    for path, leaves in layers_of(base).items()}, family=base.family)


def _fingerprints(base: Base) -> dict[str, str]:
    return dict.fromkeys(base.components, FINGERPRINT)


def _tells(recipe: Recipe, base: Base) -> dict[str, str]:
    """What the artifact will tell of how it was made, digests as zeros."""
    if recipe.output.metadata == "none":
        return {}
    merged = [Merged(Path(name).name, DIGEST, strength, frozenset(), {})
              for name, strength in map(Weighted.parse, recipe.base.adapters)]
    steps = recipe.train.known_steps or DEFAULT_STEPS  # of epochs too, of which only pictures tell
    return metadata(recipe, steps, base=_fingerprints(base), data=DATA, merged=merged,
                    environment=describe(choose_device(recipe.train.device)), prediction=base.process.prediction)
