"""Previews: pictures of the state of training, from fixed seeds, by the same code as `impasto generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from impasto.data.beside import Example
from impasto.data.phrasing import Phrasing
from impasto.families import prompts
from impasto.families.base import Base
from impasto.families.picture_info import save_picture
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import sample
from impasto.methods.base import Method
from impasto.training.environment import Precision
from impasto.training.recipe import Recipe


class Previews:
    """Draws every prompt of `[sample]` from its own fixed seed, so that only training differs between steps.

    `example`: of a prompt's number, and width and height, what to draw it with, for bases that are shown pictures.
    """

    def __init__(self, recipe: Recipe, folder: Path,
                 example: Callable[[int, int, int], Example] = lambda place, width, height: Example()) -> None:
        options, data = recipe.sample, recipe.data
        fallback = list(dict.fromkeys(Phrasing.of(one).plain(one.caption.strip()) for one in data.sets
                                      if one.caption)) if data is not None else []
        self.prompts = (options.prompts or fallback) if options.every else []
        self.options, self.folder, self.example = options, folder, example
        side = options.size or (data.resolution if data is not None else 512)
        self.settings = SampleSettings(steps=options.steps, guidance=options.guidance,
                                       scheduler=options.scheduler, width=side, height=side,
                                       image_guidance=options.image_guidance)

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
        # a base that is shown pictures gets them from the data, each prompt its own
        settings = replace(self.settings, strength=1.0) if base.extras else self.settings
        shown = [self.example(i, settings.width, settings.height) for i in left]
        trained = [module for method in methods for module in method.modules().values()]
        with evaluating(trained), base.awake(), torch.no_grad(), precision.autocast():
            pictures = sample(base, [prompts.parse(self.prompts[i]) for i in left],
                              [prompts.parse(self.options.negative)] * len(left), seeds, settings,
                              init_images=[one.picture for one in shown if one.picture] or None,
                              masks=[one.mask for one in shown if one.mask] or None)
        for i, seed, picture, one in zip(left, seeds, pictures, shown, strict=True):
            save_picture(picture, paths[i], prompt=self.prompts[i], negative=self.options.negative, seed=seed,
                         settings=settings, base=base, init=one.name, mask=one.mask_name)
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
