"""How well the embedded base draws what it is asked for.

    python -m benchmarks.mini_quality
    python -m benchmarks.mini_quality --base runs/mini/mini --prompts 64 --sheet sheet.jpg

Fresh prompts of the drawn world, a fifth of them with two objects. *Seen combinations* are those that training shows
(each prompt is new all the same), *held-out combinations* have a colour of a shape, or a background of a colour, that
it never shows. A network reads the pictures; *real renders*, the world's own pictures of all these prompts, say how
well it reads, and how well the VAE gives back what it has not seen. Each figure is the share of right answers among the
pictures to which a question applies.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import print_table
from impasto.cli.console import RichReporter
from impasto.evaluation.quality import (
    BATCH,
    GUIDANCE,
    NAMED_TEXTURE,
    STEPS,
    Asked,
    Marks,
    ask,
    drawn,
    mark,
    rendered,
    settings,
)
from impasto.evaluation.reader import load_reader
from impasto.families.load import load_base
from impasto.families.sampling import given_back
from impasto.training.environment import choose_device

#: title of a row -> the question
ROWS = {
    "shape": "shape", "colour": "colour", "background": "background", "all three": "all three",
    NAMED_TEXTURE: NAMED_TEXTURE, "texture, over all": "texture", "position": "position", "size": "size",
    "style": "style", "second colour of a shape": "accent", "relation": "relation", "second object": "second object",
    "whole pair": "whole pair",
}
#: of the prompts, so that two runs ask the same
SEED = 5_000
#: contact sheet: pictures, columns, and what lies below a picture in pixels
SHEET, COLUMNS, CAPTION = 64, 8, 36


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--prompts", type=int, default=256, help="of seen combinations; half as many held-out ones")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sheet", type=Path, help="contact sheet of the first pictures, a JPEG")
    chosen = parser.parse_args()
    report = RichReporter()
    reader = load_reader()
    base = load_base(chosen.base, device=choose_device(chosen.device), report=report)
    how = settings(base.native_size, chosen.steps, chosen.guidance)
    groups = {"seen combinations": ask(chosen.prompts, SEED),
              "held-out combinations": ask(max(chosen.prompts // 2, 1), SEED, held_out=True)}
    columns: dict[str, Marks] = {}
    started = time.monotonic()
    for name, asked in groups.items():
        with report.phase(name):
            pictures = list(drawn(base, asked, how, batch=chosen.batch, report=report))
        columns[name] = mark(asked, reader.read(pictures))
        if chosen.sheet and name == "seen combinations":
            sheet(asked[:SHEET], pictures[:SHEET]).save(chosen.sheet, quality=90)
    seconds = time.monotonic() - started
    everything = [each for asked in groups.values() for each in asked]
    renders = rendered(everything, base.native_size)
    columns["real renders"] = mark(everything, reader.read(renders))
    counts = " and ".join(f"{len(asked)} prompts of {name}" for name, asked in groups.items())
    print(f"\n{chosen.base}: {counts}; {how.scheduler}, {how.steps} steps, guidance {how.guidance:g}, "
          f"{torch.get_num_threads()} thread(s), {seconds / len(everything):.2f} s a picture\n")
    print_table(["per cent right", *columns], [
        [title, *(percent(marks.share(question)) for marks in columns.values())] for title, question in ROWS.items()])
    print(f"\nThe VAE gives the {len(renders)} real renders back at "
          f"{decibels(renders, given_back(base, renders, SEED)):.1f} dB.")


def decibels(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio of one beside the other, of 255: the mean over all pairs."""
    errors = [np.square(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()
              for one, other in zip(pictures, others, strict=True)]
    return float(np.mean(10 * np.log10(255**2 / np.array(errors))))


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def sheet(asked: Sequence[Asked], pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures in rows, each with its prompt below."""
    side = pictures[0].width
    rows = -(-len(pictures) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * (side + 4), rows * (side + CAPTION)), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(9)
    for i, (each, picture) in enumerate(zip(asked, pictures, strict=True)):
        x, y = i % COLUMNS * (side + 4), i // COLUMNS * (side + CAPTION)
        whole.paste(picture, (x, y))
        lines = textwrap.wrap(each.prompt, side // 4 - 4)
        pen.multiline_text((x + 1, y + side + 1), "\n".join(lines[:3]), fill="black", font=font, spacing=1)
    return whole


if __name__ == "__main__":
    main()
