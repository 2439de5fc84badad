"""Train the reader of pictures from random weights, on drawn scenes of all combinations, broken ones, and nothing.

    python -m scripts.train_reader [--minutes 60] [--scenes 60000] [--redrawn 5000] [--begin FILE --rate 1e-3] [-o FILE]

So many of the pictures are redrawn by the embedded base, which begins at the drawn picture and is told what it shows:
they look like what the reader will have to read, and what they show is known all the same. Minutes are of the
processor, after all that. What is averaged so far is saved after every tenth of them.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from impasto.core.files import atomic_write
from impasto.core.rng import seed_for
from impasto.evaluation import damage
from impasto.evaluation.quality import settings
from impasto.evaluation.reader import ANSWERS, BROKEN, NONE, Reader, load_reader, numbered, pixels_of, truth
from impasto.families.load import load_base
from impasto.families.sampling import sample
from impasto.mini import READER, world
from impasto.training.ema import Ema
from impasto.training.muon import Muon

BATCH, RATE, DECAY, AVERAGE = 64, 4e-3, 0.05, 0.998
#: shares: of pairs among scenes, of nothing among pictures, of broken ones and of undamaged ones in a batch
PAIRS, NOTHING, BREAK, CLEAN = 0.3, 0.1, 0.12, 0.15
#: how much of the way from noise the base goes again: little enough that a picture shows what it showed
REDRAWING = 0.3
SHAPE = list(ANSWERS).index("shape")
STYLE, PIXELATED = list(ANSWERS).index("style"), ANSWERS["style"].index("pixelated")
NO_SHAPE, BROKEN_SHAPE = ANSWERS["shape"].index(NONE), ANSWERS["shape"].index(BROKEN)
FIRST, UNSEEN = 1_000_000, 9_000_000  # seeds of the pictures to learn from, and of those to try it on

Pool = tuple[Tensor, Tensor]  # pictures uint8 (N, 3, 128, 128), and the numbers of their answers (N, questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of the processor, for the training")
    parser.add_argument("--scenes", type=int, default=60_000, help="how many pictures to learn from")
    parser.add_argument("--redrawn", type=int, default=5000, help="how many of them the embedded base redraws")
    parser.add_argument("--begin", type=Path, help="weights to go on from, instead of random ones")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("-o", "--out", type=Path, default=READER, help="where the weights go")
    chosen = parser.parse_args()
    started = time.process_time()
    pool = draw(chosen.scenes, FIRST)
    print(f"{len(pool[0])} pictures drawn in {time.process_time() - started:.0f} s", flush=True)
    replace_some(pool, chosen.redrawn)
    print(f"{chosen.redrawn} redrawn after {time.process_time() - started:.0f} s", flush=True)
    reader = train(load_reader(chosen.begin) if chosen.begin else Reader(), pool, 60 * chosen.minutes, chosen.out,
                   chosen.rate)
    examine(reader, *draw(2000, UNSEEN, nothing=0.0))


def draw(count: int, first: int, nothing: float = NOTHING) -> Pool:
    """So many pictures, of seeds from `first` on; a share of them shows nothing."""
    pixels, answers = [], []
    for seed in range(first, first + count):
        picture, found, _ = _picture(seed, nothing)
        pixels.append(pixels_of([picture]))
        answers.append(numbered(found))
    return torch.cat(pixels), torch.tensor(answers)


def replace_some(pool: Pool, count: int) -> None:
    """Have the base redraw the first pictures of a pool. It draws no squares of pixels: that style is unknown then."""
    pixels, answers = pool
    pixels[:count] = redrawn(pixels[:count], FIRST)
    styles = answers[:count, STYLE]
    styles[styles == PIXELATED] = -1


def redrawn(pixels: Tensor, first: int, nothing: float = NOTHING, batch: int = 32) -> Tensor:
    """The pictures that `draw` made from `first` on, as the embedded base draws them when it begins at them."""
    base = load_base("mini")
    how = replace(settings(base.native_size, 10), strength=REDRAWING)
    found = []
    for start in range(0, len(pixels), batch):
        part = pixels[start:start + batch]
        seeds = range(first + start, first + start + len(part))
        captions = [_picture(seed, nothing)[2] for seed in seeds]
        pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in part]
        found.append(pixels_of(sample(base, captions, [""] * len(part), seeds, how, init_images=pictures)))
    return torch.cat(found)


def _picture(seed: int, nothing: float) -> tuple[Image.Image, dict[str, str], str]:
    """A picture, what a reader should answer, and its caption."""
    rng = world.numbers("read", seed)
    if rng.random() >= nothing:
        scene = world.scene(seed, pairs=PAIRS, held_out=bool(seed % 2))
        return world.draw(scene, 128, seed), truth(scene), world.caption(scene, seed)
    if rng.random() < 0.6:
        return world.doodle(128, seed), {"shape": NONE}, ""
    colour = world.pick(rng, world.COLOURS)
    return (world.finish(world.ground(colour, 128, rng), "filled"), {"shape": NONE, "background": colour},
            f"a {colour} background")


def train(reader: Reader, pool: Pool, seconds: float, out: Path, rate: float = RATE) -> Reader:
    """The averaged reader, after so many seconds of the processor, saved on the way and at the end."""
    torch.manual_seed(0)
    parameters = list(reader.parameters())
    optimizer = Muon([{"params": parameters}], lr=rate, weight_decay=DECAY)
    ema = Ema(parameters, AVERAGE)
    step, reported, losses = 0, 0.0, []
    begun = time.process_time()
    while (share := (time.process_time() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 200) * (1 + math.cos(math.pi * share)) / 2
        pixels, answers = batch(pool, step)
        loss = judged(reader.train()(pixels), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        ema.update(step)
        losses.append(loss.item())
        if share >= reported + 0.05:
            reported += 0.05
            print(f"{share:4.0%}  step {step}  loss {sum(losses) / len(losses):.4f}", flush=True)
            losses.clear()
            if round(reported * 20) % 2 == 0:
                keep(reader, ema, out)
    return keep(reader, ema, out)


def keep(reader: Reader, ema: Ema, out: Path) -> Reader:
    """Save the averaged weights in half precision; the reader that has them."""
    with ema.shown():
        found = copy.deepcopy(reader).eval()
    with atomic_write(out) as file:
        file.write(save({name: tensor.half().contiguous() for name, tensor in found.state_dict().items()}))
    return found


def batch(pool: Pool, step: int) -> Pool:
    """Pictures of one step: most of them mildly damaged, some whole, some broken."""
    rng = torch.Generator().manual_seed(seed_for("read", step) % 2**63)
    rows = torch.randint(len(pool[0]), (BATCH,), generator=rng)
    pixels, answers = pool[0][rows], pool[1][rows]
    damaged = (torch.rand(BATCH, generator=rng) >= CLEAN).nonzero().flatten()
    things = (answers[:, SHAPE] != NO_SHAPE).nonzero().flatten()[:round(BREAK * BATCH)]
    seeds = torch.randint(2**31, (2,), generator=rng).tolist()
    pixels[things] = damage.strong(pixels[things], seeds[0])
    answers[things] = -1
    answers[things, SHAPE] = BROKEN_SHAPE
    pixels[damaged] = damage.mild(pixels[damaged], seeds[1])
    return pixels, answers


def judged(logits: list[Tensor], answers: Tensor) -> Tensor:
    """Cross-entropies of all questions, added; each the mean over the pictures of which it can be asked."""
    loss = torch.zeros(())
    for guess, answer in zip(logits, answers.T, strict=True):
        asked = (answer >= 0).sum().clamp(min=len(answer) / 8)
        loss = loss + F.cross_entropy(guess, answer, ignore_index=-1, reduction="sum") / asked
    return loss


def examine(reader: Reader, pixels: Tensor, answers: Tensor) -> None:
    """Print how often each question is answered rightly, and how often broken pictures are told."""
    clean, softened = accuracy(reader, pixels, answers), accuracy(reader, damage.mild(pixels, 1), answers)
    print(f"\n{'question':15} {'clean':>7} {'mild':>7}")
    for question, share in clean.items():
        print(f"{question:15} {share:7.2%} {softened[question]:7.2%}")
    print()
    for way, share in told(reader, pixels[:500]).items():
        print(f"broken by {way}: told of {share:.1%}")


def accuracy(reader: Reader, pixels: Tensor, answers: Tensor) -> dict[str, float]:
    """The share of right answers to each question, of the pictures of which it can be asked."""
    right, asked = reader.answer(pixels) == answers, answers >= 0
    return {question: float(right[asked[:, i], i].float().mean()) for i, question in enumerate(ANSWERS)}


def told(reader: Reader, pixels: Tensor) -> dict[str, float]:
    """The share of pictures that are called broken after each way of breaking them."""
    return {way: float((reader.answer(damage.broken(pixels, way, 2))[:, SHAPE] == BROKEN_SHAPE).float().mean())
            for way in damage.WAYS}


if __name__ == "__main__":
    main()
