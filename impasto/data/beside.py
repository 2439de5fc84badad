"""What some denoisers are shown beside a picture's noisy latents: the picture with a hole, or the one to edit.

Each picture has a few versions of it (a few holes; one picture to edit), which are encoded once, for each way in which
the picture itself is shown, so that the VAE can sleep.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from impasto.core.errors import UserError
from impasto.data import cache as caching
from impasto.data.augment import Variant
from impasto.data.frontier import VAE
from impasto.data.holes import hole, hole_facts, random_hole
from impasto.data.options import DataOptions
from impasto.data.sets import DataSets, label
from impasto.families.base import Base
from impasto.families.pictures import fit_mask, fit_picture

if TYPE_CHECKING:
    from impasto.data.items import Item


def wanted(base: Base, data: DataOptions | DataSets, reads: Collection[str], trains: Collection[str]
           ) -> tuple[str, ...]:
    """The names of what the base is to be shown (`Base.extras`) by an objective that looks at what `reads` names.

    Raises `UserError` where the data have none of it, or what the base has no place for.
    """
    extras = base.extras if "extras" in reads else ()
    for number, one in enumerate(data.sets):
        name = label(number, data)
        if "picture" in extras and one.pairs == "none":
            raise UserError("this base edits pictures, and learns from pairs of them", where=name,
                            fix=f'put the picture to edit beside each, as NAME-source.png, and say {name}.pairs=files')
        if "picture" not in extras and one.pairs != "none":
            raise UserError("this run edits no pictures", where=f"{name}.pairs",
                            fix="take an instruct-pix2pix base, or leave it out")
        if "mask" not in extras and one.inpaint == "mask":
            raise UserError("this run fills no holes in pictures", where=f"{name}.inpaint",
                            fix="take a base for inpainting, or leave it out")
    if extras and VAE in trains:
        raise UserError("what this base is shown beside a picture goes through its VAE, and is encoded once",
                        where=f"{base.variant} base", fix="leave the VAE out of what is trained")
    return extras


def versions(item: Item, extras: Sequence[str]) -> int:
    """How many versions of what is shown there are for each way of showing an item."""
    if not extras:
        return 0
    return 1 if "picture" in extras or item.handling.hole_of_mask else item.handling.holes


def extra_key(item: Item, variant: Variant, flip: bool, number: int, extras: Sequence[str], encoder: str) -> str:
    """The key of version `number`: of a picture to edit that of its moments, of one with a hole that and the hole's."""
    background = item.handling.background
    if "picture" in extras:
        assert item.source is not None, "a pair has one"
        return caching.latent_key(item.source, variant, flip, background, encoder)
    own = caching.latent_key(item.picture, variant, flip, background, encoder)
    return caching.key_of("hole", caching.RECIPE, own, *hole_facts(item, number))


def load_extra(item: Item, variant: Variant, flip: bool, number: int, extras: Sequence[str]) -> dict[str, Tensor]:
    """Version `number` in pixels: "pixels" (3, H, W) in [-1, 1], of one with a hole grey there, and "mask" (H, W), 1
    there."""
    background = item.handling.background
    if "picture" in extras:
        assert item.source is not None
        return {"pixels": variant.show(item.source.read(background), flip)}
    mask = torch.from_numpy(hole(item, variant, flip, number).copy()).float()
    return {"pixels": variant.show(item.picture.read(background), flip) * (1 - mask), "mask": mask}


def encode_extra(base: Base, loaded: dict[str, Tensor], device: torch.device, where: object) -> dict[str, Tensor]:
    """The entry: "moments" (1, 2C, h, w), and "mask" (1, 1, h, w), of each cell its first pixel's (as in diffusers)."""
    entry = caching.encode_pixels(base, loaded["pixels"], device, where)
    if "mask" in loaded:
        entry["mask"] = loaded["mask"][None, None, ::base.cell, ::base.cell].contiguous()
    return entry


@dataclass(frozen=True)
class Example:
    """What a preview is drawn with. Names are empty where there is no such file."""

    picture: Image.Image | None = None
    mask: Image.Image | None = None
    name: str = ""
    mask_name: str = ""


def example(item: Item, extras: Sequence[str], width: int, height: int) -> Example:
    """The picture to edit of an item, or the item's own with a hole, its mask or a random one; fitted to that size."""
    if not extras:
        return Example()
    shown = item.source if "picture" in extras and item.source is not None else item.picture
    whole = shown.read(item.handling.background)
    picture = fit_picture(whole, width, height)
    if "picture" in extras:
        return Example(picture, name=shown.name)
    if item.handling.hole_of_mask and item.mask is not None:
        return Example(picture, fit_mask(item.mask.read(), whole, width, height), shown.name, item.mask.path.name)
    return Example(picture, random_hole((height, width), shown.digest, "example", whole=0.0), shown.name)


def in_batch(entries: Sequence[dict[str, Tensor]], extras: Sequence[str], kept: Sequence[bool]) -> dict[str, Tensor]:
    """A batch's `extras` of those entries; of pictures to edit that are not `kept` all zeros, as if there were none."""
    moments = torch.cat([entry["moments"] for entry in entries])
    if "picture" in extras:
        return {"picture": moments * torch.tensor(kept).to(moments)[:, None, None, None]}
    return {"mask": torch.cat([entry["mask"] for entry in entries]), "masked": moments}
