"""Whether what a lesson teaches is seen in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from impasto.evaluation.lesson import Drawings, world_renders
from impasto.families.base import Base
from impasto.families.sampling import given_back

if TYPE_CHECKING:
    from impasto.evaluation.reader import Reader

#: of the latents of renders that are to look drawn by the base
LATENT_NOISE = 0.15


def recognised(sign: Drawings | Mapping[str, str], reader: Reader, base: Base, groups: Sequence[Sequence[Image.Image]],
               side: int, renders: int, seed: int) -> list[list[bool]]:
    """For each group of pictures, in which of them `sign` is seen.

    By the reader's own answers; or, where it has no word for the thing, by what it learns here and now from `renders`
    drawings of it, lookalikes, and the world's own pictures of `side` x side pixels, some as `base` gives them back.
    """
    from impasto.evaluation.reader import extend

    if not isinstance(sign, Drawings):
        return [[sign.items() <= answers.items() for answers in reader.read(pictures)] for pictures in groups]

    def looked_at(drawings: list[Image.Image]) -> list[Image.Image]:
        """As they are, and a third also with the look of what the base draws."""
        return [*drawings, *given_back(base, drawings[::3], seed, noise=LATENT_NOISE)]

    count = renders * sign.harder
    negatives = [*sign.lookalikes(count, side), *world_renders(2 * count, side)]
    recogniser = extend(reader, looked_at(sign.renders(count, side)), looked_at(negatives))
    return [recogniser.knows(pictures) for pictures in groups]
