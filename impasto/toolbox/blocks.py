"""Strengths by block: one number for each level of a UNet, as people tune merges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from impasto.core.errors import UserError, nearest

#: the words of merge-block-weighted and lora-block-weight for the levels of a UNet with two layers a block, in their
#: order; BASE is all that is in none of them, the text encoders too
LEVELS = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))

#: layers outside of the blocks -> their level
ALONE = {"unet.conv_in": "IN00", "unet.mid_block": "M00", "unet.conv_out": "OUT11", "unet.conv_norm_out": "OUT11"}


@dataclass(frozen=True)
class Blocks:
    """Factors by level, or by the beginning of a path; what is not named has the factor 1."""

    factors: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Self:
        """"IN04=0.5,M00=0,text_encoder=0", or 26 numbers: BASE, IN00 … IN11, M00, OUT00 … OUT11.

        Raises `UserError` for a word that is neither a level nor the beginning of a layer's path.
        """
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            if parts and all("=" not in part for part in parts):
                numbers = [float(part) for part in parts]
                if len(numbers) != len(LEVELS):
                    raise UserError(f"{len(numbers)} of {len(LEVELS)} numbers", where=text,
                                    fix="they are BASE, IN00 to IN11, M00, OUT00 to OUT11; or give names, as M00=0.5")
                return cls.parse(",".join(f"{level}={number}" for level, number in zip(LEVELS, numbers, strict=True)))
            pairs = [part.partition("=") for part in parts]
            found = {name.strip(): float(number) for name, _, number in pairs}
        except ValueError:
            raise UserError("is not NAME=NUMBER, with commas between", where=text) from None
        for name in found:
            if name not in LEVELS and not re.match(r"(unet|text_encoder(_[23])?|vae|transformer)(\.|$)", name):
                raise UserError(f"has no block {name!r}", where=text, fix=nearest(name, LEVELS))
            if not math.isfinite(found[name]):
                raise UserError(f"gives {name} the factor {found[name]}", where=text, fix="give a number")
        return cls(found)

    def check(self, paths: Iterable[str]) -> None:
        """Raise a `UserError` for a name of a path that none of these begins with."""
        left = {name for name in self.factors if name not in LEVELS}
        known = list(paths)
        for path in known:
            left -= {name for name in left if path == name or path.startswith(f"{name}.")}
        if left:
            starts = {".".join(path.split(".")[:count]) for path in known for count in (1, 2, 3)}
            raise UserError("is the beginning of no layer's path", where=min(left), fix=nearest(min(left), starts))

    def of(self, path: str) -> float:
        """The factor of a layer or a tensor, by its path from the component on: that of the longest beginning that is
        named, else its level's."""
        named = [name for name in self.factors if path == name or path.startswith(f"{name}.")]
        return self.factors[max(named, key=len)] if named else self.factors.get(level(path), 1.0)


#: every block as it is
PLAIN = Blocks({})


def level(path: str) -> str:
    """The level of a layer, by its path in diffusers' names: unet.down_blocks.1.attentions.0… is IN04."""
    found = re.match(r"unet\.(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path)
    if found is None:
        return next((word for start, word in ALONE.items() if path == start or path.startswith(f"{start}.")), "BASE")
    way, block, kind, number = found[1], int(found[2]), found[3], int(found[4])
    if way == "down":
        return f"IN{3 * block + (3 if kind == 'downsamplers' else 1 + number):02}"
    return f"OUT{3 * block + (2 if kind == 'upsamplers' else number):02}"
