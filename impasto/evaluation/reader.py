"""A reader of pictures: a small network that says what a drawn picture shows, so that generated ones can be judged.

It answers the questions of `impasto.mini.labels` and can be taught to know one new thing from a handful of its
pictures. Two objects have no order in a picture, "a star left of a heart" being "a heart right of a star": the first
is the left or upper one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.evaluation import damage
from impasto.mini import READER, labels
from impasto.mini.shapes import ACCENTS
from impasto.mini.world import Scene

#: pixels of a picture's side as it is read
SIDE = 128
#: further answers about the shape: nothing that the world knows, and nothing proper
NONE, BROKEN = "none", "broken"
#: relations as said of the right or lower object, and of the other
_TURNED = {"right of": "left of", "below": "above"}
#: what is said of one object -> what is said of the other
_EXCHANGED = {"shape": "second shape", "colour": "second colour", "second shape": "shape", "second colour": "colour"}

#: each question with the answers that a reader gives
ANSWERS: dict[str, tuple[str, ...]] = {
    **labels.QUESTIONS, "shape": (*labels.QUESTIONS["shape"], NONE, BROKEN), "relation": (NONE, "left of", "above")}
_STYLE = list(ANSWERS).index("style")


def truth(scene: Scene) -> dict[str, str]:
    """What a reader should answer about a scene's picture: only what can be asked of it."""
    return oriented({"relation": NONE, **labels.answers(scene)})


def oriented(found: dict[str, str]) -> dict[str, str]:
    """Answers about two objects in the order that a reader gives them: the left or upper one first."""
    if found.get("relation") not in _TURNED:
        return found
    return exchanged(found) | {"relation": _TURNED[found["relation"]]}


def exchanged(found: Mapping[str, str]) -> dict[str, str]:
    """Answers about two objects, the second one's told of the first and the other way round; no other is touched."""
    return {question: found[_EXCHANGED.get(question, question)] for question in found}


def numbered(found: dict[str, str]) -> list[int]:
    """The number of each answer among the `ANSWERS`, -1 where there is none."""
    return [choices.index(found[question]) if question in found else -1 for question, choices in ANSWERS.items()]


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, momentum=.02)
        self.two, self.norm_two = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, momentum=.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x))))))


@final
class Reader(nn.Module):
    """The network: convolutions from 64 x 64 blocks of 2 x 2 pixels to 4 x 4, and a linear head for each question.

    A style shows in the finest edges, which a second, short path sees before they are merged.
    """

    WIDTHS = (16, 32, 80, 128)
    HIDDEN = 160
    FINE = (24, 32)
    coordinates: Tensor  # (2, 64, 64), x and y

    def __init__(self) -> None:
        super().__init__()
        first, second, third, last = self.WIDTHS
        self.stem = self._layer(3 * 4 + 2, first, 5)
        self.early = nn.Sequential(self._layer(first, second), _Block(second))
        self.middle = nn.Sequential(self._layer(second, third), _Block(third))
        self.late = nn.Sequential(self._layer(third, last), _Block(last))
        self.places = nn.Conv2d(last, 32, 1)
        self.hidden = nn.Linear(2 * last + 32 * 16, self.HIDDEN)
        fine, finer = self.FINE
        self.fine = nn.Sequential(self._layer(3 * 4, fine, stride=1), self._layer(fine, finer),
                                  self._layer(finer, finer))
        self.edges = nn.Linear(2 * finer, len(ANSWERS["style"]))
        self.heads = nn.ModuleList(nn.Linear(self.HIDDEN, len(choices)) for choices in ANSWERS.values())
        line = (torch.arange(SIDE // 2) + 0.5) * 4 / SIDE - 1
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(line, line, indexing="xy")), persistent=False)

    @staticmethod
    def _layer(width: int, wider: int, kernel: int = 3, stride: int = 2) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, wider, kernel, stride=stride, padding=kernel // 2, bias=False),
                             nn.BatchNorm2d(wider, momentum=0.02), nn.ReLU())

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Logits of each question, (N, answers), of pictures uint8 (N, 3, 128, 128)."""
        blocks = self._blocks(pixels)
        late = self._stages(blocks)[-1]
        seen = torch.cat([late.mean((2, 3)), late.amax((2, 3)), F.relu(self.places(late)).flatten(1)], 1)
        hidden = F.relu(self.hidden(seen))
        found = [head(hidden) for head in self.heads]
        found[_STYLE] = found[_STYLE] + self.style(blocks)
        return found

    def style(self, blocks: Tensor) -> Tensor:
        """What the fine edges add to the logits of the style, (N, styles)."""
        fine = self.fine(blocks)
        return self.edges(torch.cat([fine.mean((2, 3)), fine.amax((2, 3))], 1))

    @staticmethod
    def _blocks(pixels: Tensor) -> Tensor:
        """Blocks of 2 x 2 pixels, (N, 12, 64, 64) in [-1, 1]."""
        blocks = F.pixel_unshuffle(pixels.float() / 127.5 - 1, 2)
        return blocks.contiguous(memory_format=torch.channels_last)

    def _stages(self, blocks: Tensor) -> list[Tensor]:
        """What the network sees at 16 x 16, 8 x 8 and 4 x 4."""
        x = torch.cat([blocks, self.coordinates.expand(len(blocks), -1, -1, -1)], 1)
        x = x.contiguous(memory_format=torch.channels_last)
        early = self.early(self.stem(x))
        middle = self.middle(early)
        return [early, middle, self.late(middle)]

    @torch.no_grad()
    def answer(self, pixels: Tensor) -> Tensor:
        """The number of each question's answer, (N, questions), whether it can be asked or not."""
        return torch.cat([torch.stack([logits.argmax(1) for logits in self(part)], 1) for part in pixels.split(128)])

    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        """What each picture shows: question -> answer, only what can be asked of it."""
        return [_sensible({question: choices[n] for (question, choices), n in zip(ANSWERS.items(), row, strict=True)})
                for row in self.answer(pixels_of(pictures)).tolist()] if pictures else []

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What the network sees in each picture, wherever it is: (N, F)."""
        return self.pooled(pixels_of(pictures))

    @torch.no_grad()
    def pooled(self, pixels: Tensor) -> Tensor:
        """`features` of pictures uint8 (N, 3, 128, 128)."""
        found = []
        for part in pixels.split(128):
            blocks = fine = self._blocks(part)
            stages = self._stages(blocks)
            for layer in self.fine:
                stages.append(fine := layer(fine))
            found.append(torch.cat([pool for stage in stages for pool in (stage.mean((2, 3)), stage.amax((2, 3)))], 1))
        return torch.cat(found)


def _sensible(found: dict[str, str]) -> dict[str, str]:
    """Of all answers, those whose questions make sense beside the others."""
    wanted = {"shape", "background"}
    if found["shape"] not in (NONE, BROKEN):
        wanted |= {"colour", "relation"}
        if found["relation"] != NONE:
            wanted |= {"second shape", "second colour"}
        else:
            wanted |= {"texture", "position", "size", "style"} | ({"accent"} if found["shape"] in ACCENTS else set())
    return {question: answer for question, answer in found.items() if question in wanted}


def pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures at the size at which they are read: uint8 (N, 3, 128, 128)."""
    sized = [picture.convert("RGB").resize((SIDE, SIDE), _resampling(picture.width)) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in sized])).permute(0, 3, 1, 2).contiguous()


def _resampling(width: int) -> Image.Resampling:
    """Averages of larger pictures; smooth transitions in smaller ones, whose pixels would else look like a style."""
    return Image.Resampling.BOX if width >= SIDE else Image.Resampling.BICUBIC


def load_reader(path: Path = READER) -> Reader:
    """The reader that the package brings. Raises `UserError` if it is missing."""
    if not path.is_file():
        raise UserError("this installation came without its reader of pictures", where=path,
                        fix="install Impasto again from its repository or its wheel, which have it; or train it: "
                        "python -m scripts.train_reader")
    reader = Reader()
    reader.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return reader.eval()


# --- something new -----------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Recogniser:
    """Knows one thing that its reader was never taught: a plane through the reader's features."""

    reader: Reader
    weight: Tensor  # (F,)
    bias: Tensor

    def scores(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Log odds that each picture shows it, (N,)."""
        return self.reader.features(pictures) @ self.weight + self.bias

    def knows(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture shows it."""
        return (self.scores(pictures) > 0).tolist()


def extend(reader: Reader, positives: Sequence[Image.Image], negatives: Sequence[Image.Image],
           seed: int = 0, decay: float = 1e-3) -> Recogniser:
    """Teach a reader a new thing: logistic regression on the features of what is it and what is not.

    Both are also seen mildly damaged, four times each; and what is it, broken, is not it.
    """
    yes, no = pixels_of(positives), pixels_of(negatives)
    views = [(pixels, label) for pixels, label in ((yes, 1.0), (no, 0.0))]
    views += [(damage.mild(pixels, 10 * seed + i), label) for pixels, label in views for i in range(4)]
    views += [(damage.strong(yes, 10 * seed + i), 0.0) for i in range(2)]
    seen = torch.cat([reader.pooled(pixels) for pixels, _ in views])
    target = torch.cat([torch.full((len(pixels),), label) for pixels, label in views])
    mean, scale = seen.mean(0), seen.std(0) + 1e-3
    known = (seen - mean) / scale
    even = torch.where(target > 0, 0.5 / target.mean(), 0.5 / (1 - target.mean()))
    weight = torch.zeros(known.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = known @ weight[:-1] + weight[-1]
        found = F.binary_cross_entropy_with_logits(logits, target, even) + decay * weight[:-1].square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    plane = weight.detach()[:-1] / scale
    return Recogniser(reader, plane, weight.detach()[-1] - mean @ plane)
