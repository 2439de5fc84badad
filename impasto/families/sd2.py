"""Stable Diffusion 2.0 and 2.1: OpenCLIP's ViT-H/14 without its last layer, and a network of noise or of velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from impasto.families.sd1 import SD1


@dataclass(kw_only=True)
class SD2(SD1):
    """Stable Diffusion 2.x. Text states: "states" (B, n·77, 1024) for captions of up to n chunks.

    All that it has of its own is in its tables: the text encoder, the sizes of heads, what fills a chunk.
    """

    family: ClassVar[str] = "sd2"
