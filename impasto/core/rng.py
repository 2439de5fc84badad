"""Every random draw is a pure function of (seed, step, sample, use).

There is no generator whose state would have to be saved: a resumed run, another number of processes or
another order of arrival takes the very same numbers. Draws are made on the CPU and then moved, so that
they do not depend on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_for(*key: int | str) -> int:
    """A 63-bit seed from any key, by blake2b. Equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_for(*key)`."""
    return torch.Generator("cpu").manual_seed(seed_for(*key))


def picture_generator(seed: int) -> torch.Generator:
    """The CPU generator that a picture of `seed` is drawn with: the plain seed, as diffusers' users and ComfyUI
    have it, so that one seed begins with the same noise everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def permutation(n: int, *key: int | str) -> list[int]:
    """A permutation of range(n), a function of the key alone."""
    return torch.randperm(n, generator=generator(*key)).tolist()


class Draws:
    """The draws of one batch: one row for each sample, each from that sample's own generator.

    `samples` are positions in the effective batch (across ranks and micro-steps): one picture may stand
    there twice and gets two different draws.
    """

    def __init__(self, seed: int, step: int, samples: Sequence[int],
                 device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.samples, self.device = seed, step, list(samples), torch.device(device)

    def _rows(self, use: str, shape: Sequence[int], draw) -> Tensor:
        rows = [draw(tuple(shape), generator=generator(self.seed, self.step, sample, use))
                for sample in self.samples]
        return torch.stack(rows).to(self.device)

    def normal(self, use: str, shape: Sequence[int]) -> Tensor:
        """Standard normal draws, (B, *shape), fp32."""
        return self._rows(use, shape, torch.randn)

    def uniform(self, use: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0, 1), (B, *shape), fp32."""
        return self._rows(use, shape, torch.rand)
