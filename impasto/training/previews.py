"""Previews: pictures of the state of training, from fixed seeds, by the same code as `impasto generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from impasto.data.phrasing import Phrasing
from impasto.families import prompts
from impasto.families.base import Base
from impasto.families.picture_info import save_picture
from impasto.families.sampling import SampleSettings, sample
from impasto.methods.base import Method
from impasto.training.environment import Precision
from impasto.training.recipe import Recipe


class Previews:
    """Draws every prompt of `[sample]` from its own fixed seed, so that only training differs between steps."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        options, data = recipe.sample, recipe.data
        fallback = list(dict.fromkeys(Phrasing.of(one).plain(one.caption.strip()) for one in data.sets
                                      if one.caption)) if data is not None else []
        self.prompts = (options.prompts or fallback) if options.every else []
        self.options, self.folder = options, folder
        side = options.size or (data.resolution if data is not None else 512)
        self.settings = SampleSettings(steps=options.steps, guidance=options.guidance,
                                       scheduler=options.scheduler, width=side, height=side)

    def due(self, step: int, total: int) -> bool:
        """Whether pictures are asked for after optimizer step `step`: at first, at last and every N steps."""
        return bool(self.prompts) and (step == total or step % self.options.every == 0)

    def make(self, base: Base, methods: list[Method], precision: Precision, step: int) -> list[Path]:
        """Draw and save the pictures of one step; those that are there already are kept."""
        paths = [self.folder / f"{step:06d}-{i}.png" for i in range(len(self.prompts))]
        left = [i for i, path in enumerate(paths) if not path.exists()]
        if not left:
            return paths
        seeds = [self.options.seed + i for i in left]
        trained = [module for method in methods for module in method.modules().values()]
        with evaluating(trained), awake(base), torch.no_grad(), precision.autocast():
            pictures = sample(base, [prompts.parse(self.prompts[i]) for i in left],
                              [prompts.parse(self.options.negative)] * len(left), seeds, self.settings)
        for i, seed, picture in zip(left, seeds, pictures, strict=True):
            save_picture(picture, paths[i], prompt=self.prompts[i], negative=self.options.negative, seed=seed,
                         settings=self.settings, base=base)
        return paths


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Dropout off in modules, for the length of the block; then each part of them as it was."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def awake(base: Base) -> Iterator[None]:
    """Every component on the denoiser's device for the length of the block; then each where it slept."""
    slept = {name: next(module.parameters()).device for name, module in base.components.items()}
    for module in base.components.values():
        module.to(base.device)
    try:
        yield
    finally:
        for name, device in slept.items():
            base.components[name].to(device)
