"""Class pictures drawn with the base: once for each base, caption and sampler setting.

They are numbered files. Number i has seed i and is drawn in the fixed batch that i belongs to, so an
interrupted drawing goes on, and more pictures later leave the first ones as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from impasto.core.files import atomic_write, cache_dir, write_json
from impasto.core.progress import Reporter
from impasto.data.cache import image_encoder_key, key_of, precision, text_encoder_key
from impasto.data.dataset import Listing
from impasto.data.options import PriorOptions
from impasto.families.base import Base
from impasto.families.beginning import nothing_kept
from impasto.families.sample_settings import SampleSettings
from impasto.families.sampling import sample


def prior_folder(base: Base, fingerprint: Mapping[str, str], prior: PriorOptions,
                 settings: SampleSettings) -> Path:
    """Where class pictures of these settings lie, drawn or yet to be drawn."""
    drawn_by = (sorted(fingerprint.items()), precision(base, base.denoiser_name),
                text_encoder_key(base, fingerprint), image_encoder_key(base, fingerprint),
                sorted(base.process.scheduler_config().items()), sorted(base.scheduler.items()))
    drawn_as = (prior.caption, prior.batch_size, settings.steps, settings.guidance, settings.scheduler,
                settings.width, settings.height)
    return cache_dir() / "prior" / key_of(drawn_by, drawn_as)


def draw_prior(base: Base, fingerprint: Mapping[str, str], prior: PriorOptions, side: int, report: Reporter,
               rank: int = 0, world: int = 1) -> Listing:
    """`prior.images` class pictures, squares of `side` pixels; those that are not there yet are drawn.

    Each process begins at its own share and goes once around, passing over what others have drawn meanwhile.
    """
    assert prior.caption is not None, "the options ask for it where pictures are to be drawn"
    settings = SampleSettings(steps=prior.steps, guidance=prior.guidance, scheduler=prior.scheduler,
                              width=side, height=side, strength=1.0)
    folder = prior_folder(base, fingerprint, prior, settings)
    names = [f"{i:06d}.png" for i in range(prior.images)]
    missing = {i for i, name in enumerate(names) if not (folder / name).exists()}
    if missing:
        about = {"prior": prior.model_dump(mode="json"), "side": side, "base": dict(fingerprint)}
        write_json(folder / "about.json", about)
    batches = sorted({i // prior.batch_size for i in missing})
    start = rank * len(batches) // world
    with report.phase("drawing class pictures", prior.images, "pictures") as advance, torch.no_grad():
        advance(prior.images - len(missing))
        for batch in batches[start:] + batches[:start]:
            numbers = range(batch * prior.batch_size, (batch + 1) * prior.batch_size)
            wanted = {i: folder / names[i] for i in numbers if i in missing}
            if not all(path.exists() for path in wanted.values()):
                _draw(base, prior, numbers, settings, wanted)
            advance(len(wanted))
    return Listing(folder, names, [], [])


def _draw(base: Base, prior: PriorOptions, numbers: range, settings: SampleSettings,
          wanted: Mapping[int, Path]) -> None:
    """Draw one whole batch, whatever of it is wanted: the others' absence would change the last bits."""
    count = len(numbers)
    blank, masks = nothing_kept(base, settings, count)
    pictures = sample(base, [str(prior.caption)] * count, [""] * count, list(numbers), settings, init_images=blank,
                      masks=masks)
    for number, picture in zip(numbers, pictures, strict=True):
        if number in wanted:
            with atomic_write(wanted[number]) as file:
                picture.save(file, format="PNG")
