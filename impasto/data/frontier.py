"""The frontier rule: what is encoded once and cached, and what in every step.

Where nothing trainable and nothing random lies upstream, an encoder's output is computed once. A finite
choice (a mirrored picture) caches every variant. An encoder that is trained, or ever was in this run, is
never cached. The planner asks this same function.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from impasto.data.options import DataOptions

#: diffusers' name of the picture encoder, in every family
VAE = "vae"


@dataclass(frozen=True)
class Frontier:
    """What is cached. What is not, the step encodes."""

    latents: bool
    text: bool
    #: variants of each picture that are cached: mirrored or not
    flips: tuple[bool, ...]
    #: components that the step needs beside the denoiser
    needs: frozenset[str]


def frontier(trains: Collection[str], text_encoders: Collection[str], data: DataOptions) -> Frontier:
    """What is cached when the components named in `trains` are trained, on a base with these `text_encoders`.

    One trained text encoder of several keeps all of them in the step: their states are one entry.
    """
    latents = VAE not in trains
    text = not set(text_encoders) & set(trains)
    needs = frozenset(() if latents else (VAE,)) | frozenset(() if text else text_encoders)
    return Frontier(latents, text, (False, True) if data.flip else (False,), needs)
