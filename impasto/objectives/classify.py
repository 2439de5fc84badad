"""What a caption says, read off the text encoder's last state: a text encoder's schooling before any picture.

Denoising alone teaches a text encoder from random weights next to nothing for a long time; a real base's has seen
captions by the hundred million (CLIP). Here each label of a picture is predicted from the state of its caption's
last token, by a linear layer that is thrown away afterwards. Only data that know their labels can be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.core.rng import Draws, seed_for
from impasto.families.base import Base
from impasto.objectives.base import Objective, ObjectiveOptions
from impasto.objectives.batch import Batch


class ClassifyOptions(ObjectiveOptions):
    """`[objective] kind = "classify"`."""

    kind: Literal["classify"] = "classify"


class Classify(Objective):
    """Cross-entropy of every label, averaged over those that a picture has."""

    Options = ClassifyOptions
    reads = frozenset({"captions"})

    def prepare(self, base: Base, labels: Sequence[int], seed: int) -> dict[str, nn.Module]:
        if not labels:
            raise UserError("these pictures have captions only, no labels", where="objective classify",
                            fix='use data.source = "world", or another objective')
        with torch.no_grad():
            width = base.encode_text([""])["states"].shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "init", "classify"))
            self.head = nn.Linear(width, sum(labels))
        for parameter in self.head.parameters():  # not by `Module.to`, which cannot move fake tensors
            parameter.data = parameter.data.to(base.device)
        self.sizes = list(labels)
        return {"head": self.head}

    def loss(self, base: Base, batch: Batch, draws: Draws) -> Tensor:
        """Per-sample losses (B,), fp32."""
        assert batch.labels is not None and batch.captions is not None
        last = base.encode_text(batch.captions)["states"][:, -1].float()
        scores = self.head(last).split(self.sizes, dim=1)
        known = (batch.labels >= 0).float()
        each = torch.stack([F.cross_entropy(score, label.clamp(min=0), reduction="none")
                            for score, label in zip(scores, batch.labels.unbind(1), strict=True)], 1)
        return (each * known).sum(1) / known.sum(1).clamp(min=1)
