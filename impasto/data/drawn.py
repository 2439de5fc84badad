"""Pictures of the drawn world as a run's data: each is drawn when it is read, and known by its number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from PIL import Image

from impasto.core.rng import seed_for
from impasto.data.dataset import Picture
from impasto.mini import world
from impasto.mini.labels import NOTHING, labels


@dataclass(frozen=True)
class Drawn(Picture):
    """One picture of the world, or a doodle."""

    seed: int
    scene: world.Scene | None  # None for a doodle

    @classmethod
    def number(cls, number: int, side: int, seed: int, doodles: float) -> Self:
        """The picture of that number among those of `seed`, of which a share of `doodles` shows nothing."""
        own = seed_for("drawn", seed, number)
        doodle = seed_for("doodle", own) / 2**63 < doodles
        name = f"{'doodle' if doodle else 'drawing'} {number}"
        return cls(Path(name), name, f"world {world.VERSION} {own} {doodle} {side}", (side, side), own,
                   None if doodle else world.scene(own))

    @property
    def caption(self) -> str:
        """What it shows, in words."""
        return "" if self.scene is None else world.caption(self.scene, self.seed)

    @property
    def labels(self) -> tuple[int, ...]:
        """What it shows, as numbers."""
        return NOTHING if self.scene is None else labels(self.scene)

    def read(self, background: str = "white") -> Image.Image:
        side = self.size[0]
        return world.doodle(side, self.seed) if self.scene is None else world.draw(self.scene, side, self.seed)
