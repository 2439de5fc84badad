"""Reading labels off captions: the loss against its formula, and that it is learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from impasto.core.errors import UserError
from impasto.core.rng import Draws
from impasto.objectives.batch import Batch
from impasto.objectives.classify import Classify, ClassifyOptions
from tests.families.conftest import random_sd1


def batch() -> Batch:
    return Batch([0, 1], ["a", "b"], torch.ones(2), captions=["red star", "blue"],
                 labels=torch.tensor([[1, 2], [0, -1]]))


def test_the_loss_is_the_mean_over_known_labels() -> None:
    base, objective = random_sd1(), Classify(ClassifyOptions())
    head = objective.prepare(base, (2, 3), seed=0)["head"]
    loss = objective.loss(base, batch(), Draws(0, 0, [0, 1]))
    scores = head(base.encode_text(["red star", "blue"])["states"][:, -1])
    first = (F.cross_entropy(scores[0, :2], torch.tensor(1)) + F.cross_entropy(scores[0, 2:], torch.tensor(2))) / 2
    torch.testing.assert_close(loss, torch.stack([first, F.cross_entropy(scores[1, :2], torch.tensor(0))]))


def test_pictures_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="captions only, no labels.*world"):
        Classify(ClassifyOptions()).prepare(random_sd1(), (), seed=0)
