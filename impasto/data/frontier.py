"""The frontier rule: what is encoded once and cached, and what in every step.

Where nothing trainable and nothing random lies upstream, an encoder's output is computed once. A finite
choice (a mirrored picture, its variants, a few wildcards) caches every variant. An encoder that is trained, or ever
was in this run, is never cached. The planner asks this same function.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from impasto.data.options import DataOptions
from impasto.data.sets import DataSets

#: what most objectives look at
READS = frozenset({"pictures", "captions"})

#: diffusers' name of the picture encoder, in every family
VAE = "vae"


@dataclass(frozen=True)
class Frontier:
    """What comes encoded, and what as it is, to be encoded in the step. Neither: the objective does not look at it."""

    latents: bool
    pixels: bool
    text: bool
    captions: bool
    #: variants of a picture that are cached: mirrored or not, where its set asks for both
    flips: tuple[bool, ...]
    #: components that the step needs beside the denoiser
    needs: frozenset[str]
    #: what the denoiser is shown beside latents, by name; always cached
    extras: tuple[str, ...] = ()


def frontier(trains: Collection[str], text_encoders: Collection[str], data: DataOptions | DataSets,
             reads: Collection[str] = READS, *, many: bool = False, extras: tuple[str, ...] = ()) -> Frontier:
    """What is cached when the components named in `trains` are trained, on a base with these `text_encoders`, for
    an objective that looks at what `reads` names.

    One trained text encoder of several keeps all of them in the step: their states are one entry. So does chance
    over more captions than are worth encoding beforehand: tags that are shuffled or left out, or `many`, where a
    picture has more than `phrasing.MOST_VARIANTS` of them by its wildcards. `extras`: what `beside.wanted` names.
    """
    pictures, captions = "pictures" in reads, "captions" in reads
    pixels = pictures and VAE in trains
    chance = many or any(one.shuffle_tags or one.tag_dropout > 0 for one in data.sets)
    texts = captions and (chance or bool(set(text_encoders) & set(trains)))
    needs = frozenset((VAE,) if pixels else ()) | frozenset(text_encoders if texts else ())
    return Frontier(pictures and not pixels, pixels, captions and not texts, texts,
                    (False, True) if any(one.flip for one in data.sets) else (False,), needs, extras)
