"""One batch of pictures of one shape, on its way from the data to the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from impasto.families.base import Caption, Geometry, TextStates


@dataclass
class Batch:
    """B pictures of one shape. Of `moments` and `pixels` one is given at most; of `text` and `captions` likewise.

    Which one, the frontier rule decides: what nothing trainable and nothing random precedes comes cached.
    """

    samples: list[int]  # positions in the effective batch: what draws are keyed by
    names: list[str]  # the files, for messages
    weight: Tensor  # (B,) loss weight of each picture
    moments: Tensor | None = None  # (B, 2C, h, w)
    pixels: Tensor | None = None  # (B, 3, H, W) in [-1, 1]
    text: TextStates | None = None
    captions: Sequence[Caption] | None = None
    labels: Tensor | None = None  # (B, K) what is known of the pictures, -1 where nothing is
    mask: Tensor | None = None  # (B, 1, h, w) what the loss of each latent cell is multiplied by
    geometry: Geometry | None = None
    #: what the denoiser is shown beside latents (`Base.extras`): masks (B, 1, h, w), pictures' moments (B, 2C, h, w)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with all of its tensors on `device`."""
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self, weight=self.weight.to(device), moments=moved(self.moments), pixels=moved(self.pixels),
            text=None if self.text is None else {name: state.to(device) for name, state in self.text.items()},
            labels=moved(self.labels), mask=moved(self.mask),
            geometry=None if self.geometry is None else self.geometry.to(device),
            extras={name: tensor.to(device) for name, tensor in self.extras.items()})
