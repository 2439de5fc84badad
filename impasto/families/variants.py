"""What some denoisers are shown beside noisy latents: a picture to fill a hole in, or a picture to edit.

Their first layer has more channels, in this order (that of diffusers' pipelines):
- plain: latents (C);
- inpainting (RunwayML, on Rombach et al. 2022): latents (C), mask (1), latents of the masked picture (C). The mask is 1
  where the picture is to be drawn anew; there the masked picture is grey. Its latents are a sample, scaled as latents
  are;
- instruct-pix2pix (Brooks et al. 2023): latents (C), latents of the picture to edit (C): the mean of its distribution,
  not scaled, all zeros where there is no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from impasto.core.errors import UserError

INPAINTING, PIX2PIX = "inpainting", "instruct-pix2pix"

#: variant -> what it is shown, by name, in the order of its channels
EXTRAS: dict[str, tuple[str, ...]] = {"": (), INPAINTING: ("mask", "masked"), PIX2PIX: ("picture",)}

#: variant -> what it asks for, in words
NEEDS = {INPAINTING: "a picture and a mask of what is to be drawn anew", PIX2PIX: "a picture to edit"}

#: draws normal noise of a shape (C, h, w) for each picture, of a use: (B, C, h, w)
Normal = Callable[[str, Sequence[int]], Tensor]


def variant_of(channels: int, latents: int) -> str | None:
    """The variant of a denoiser with so many input channels, on latents of so many; None: of no known one."""
    return {latents: "", 2 * latents + 1: INPAINTING, 2 * latents: PIX2PIX}.get(channels)


def seen(extras: Mapping[str, Tensor], latents: Callable[[Tensor, Tensor], Tensor],
         normal: Normal) -> dict[str, Tensor]:
    """`extras` as `condition` takes them: moments (B, 2C, h, w) of pictures become latents (B, C, h, w), fp32.

    `latents` scales the sample of moments that a noise picks, which `normal` draws.
    """
    found = dict(extras)
    if "masked" in extras:
        moments = extras["masked"]
        found["masked"] = latents(moments, normal("masked", (moments.shape[1] // 2, *moments.shape[2:]))).float()
    if "picture" in extras:
        found["picture"] = extras["picture"].float().chunk(2, dim=1)[0]
    return found


def beside(variant: str, extras: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A condition's own part for what is shown: {"beside": (B, channels, h, w)}, empty of a plain denoiser.

    A mask (B, 1, H, W) in pixels is taken at each latent cell's first pixel (nearest, as in diffusers). Other extras
    are the family's own. Raises `UserError` for what is missing, or is shown to a denoiser that has no place for it.
    """
    given = {name: one for name, one in (extras or {}).items() if any(name in names for names in EXTRAS.values())}
    wanted = EXTRAS[variant]
    if surplus := [name for name in given if name not in wanted]:
        raise UserError(f"{f'an {variant}' if variant else 'a plain'} base has no place for {' and '.join(surplus)}",
                        fix="leave it out, or take a base that was made for it")
    if any(name not in given for name in wanted):
        raise UserError(f"an {variant} base is to be shown {NEEDS[variant]}", fix="give that too, or take a plain base")
    if not wanted:
        return {}
    cells = given[wanted[-1]].shape[-2:]
    if "mask" in given and given["mask"].shape[-2:] != cells:
        given["mask"] = F.interpolate(given["mask"], size=cells)
    return {"beside": torch.cat([given[name].to(given[wanted[-1]]) for name in wanted], dim=1)}


def joined(latents: Tensor, condition: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What the first layer sees, and what is left of the condition."""
    rest = dict(condition)
    shown = rest.pop("beside", None)
    return (latents if shown is None else torch.cat([latents, shown.to(latents)], dim=1)), rest
