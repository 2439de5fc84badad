"""Whether what was learned on the embedded base serves on a sibling of it.

    python -m benchmarks.sibling [--seeds 3] [--jobs 2] [--sheet FILE]

The sibling is made when it is first needed: the base's UNet, fine-tuned whole on pictures of its world that are all
glossy, under captions that do not say so, until it draws everything so; the text encoder is frozen, and so the same.
That is how most checkpoints that people share have come of one another. A LoRA, a hypernetwork and an embedding, made
on the base by the miniature's recipes, then draw on both. *concept*: pictures in which what was taught is seen, whether
matt or glossy; *prompt*: whose background is the one that was asked for; *glossy*: drawn as the sibling draws.
An embedding names what a base can draw, so the striped heart is what all three are asked for; the mascot is new.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.cells import Cell, measure, options
from benchmarks.common import print_table
from benchmarks.sheets import contact
from impasto.cli.console import RichReporter
from impasto.core.files import atomic_folder, write_json
from impasto.evaluation.lesson import LESSONS, Amounts, Drawings, old_asked
from impasto.evaluation.quality import Asked, drawn, mark, settings
from impasto.evaluation.reader import load_reader
from impasto.evaluation.recognition import recognised
from impasto.families.load import load_base
from impasto.mini import lessons, world
from impasto.training.recipe import load_recipe
from impasto.training.trainer import train

STYLE, PICTURES, SIDE = "glossy", 600, 128
#: recipe -> the lessons by which it is measured
MADE = {"textual_inversion": ("familiar",), "lora": ("familiar", "mascot"), "hypernetwork": ("familiar", "mascot")}
TRAINING = ("prior.weight=0", "method.parts=[\"unet\"]", "train.steps=500", "train.batch_size=8",
            "train.learning_rate=3e-4", "data.caption_dropout=0.1", "sample.every=0", "train.device=cpu")
FIGURES = ("concept", "prompt", "glossy")


# --- the sibling ---------------------------------------------------------------------------------------
def sibling(folder: Path) -> Path:
    """Its folder, in diffusers' layout."""
    recipe = load_recipe("mini/full", [f"output.dir={json.dumps(str(folder / 'run'))}", "output.name=sibling",
                                       f"data.folder={json.dumps(str(pictures(folder / 'pictures')))}", *TRAINING])
    made = folder / "run" / "sibling"
    if not made.exists():
        artifact = train(recipe, RichReporter()).artifact
        assert artifact == made, artifact
    return made


def pictures(folder: Path) -> Path:
    """The world's scenes of one object, all of them in the style, which their captions do not mention."""
    if not folder.is_dir():
        with atomic_folder(folder) as part:
            for i in range(PICTURES):
                scene = world.scene(50_000 + i, pairs=0.0)
                plain = replace(scene, style="filled")
                world.draw(replace(scene, style=STYLE), SIDE, i).save(part / f"{i}.png")
                (part / f"{i}.txt").write_text(world.caption(plain, i), encoding="utf-8")
    return folder


# --- looking -------------------------------------------------------------------------------------------
def sign_of(lesson: str) -> Any:
    """By what a lesson's thing is known, matt or glossy."""
    sign = LESSONS[lesson].sign
    if not isinstance(sign, Drawings):
        return sign
    return Drawings(lambda count, side: [*lessons.mascot_renders(count // 2, side),
                                         *lessons.mascot_renders(count // 2, side, 5000, STYLE)], sign.lookalikes)


def looked_at(cell: Cell, folder: Path, other: Path) -> dict[str, dict[str, float]]:
    """The figures of an adapter's pictures on the base and on the sibling."""
    place = cell.place(folder) / "sibling.json"
    if not place.exists():
        asked = LESSONS[cell.lesson].asked(Amounts().new, cell.seed)
        adapters = ((cell.adapter(folder), 1.0),)
        found = shown(asked, cell.lesson, other, adapters, place.with_suffix(""))
        write_json(place, found)
    return json.loads(place.read_text(encoding="utf-8"))


def shown(asked: Sequence[Asked], lesson: str, other: Path, adapters: Any, keep: Path) -> dict[str, dict[str, float]]:
    """The figures of both bases' pictures of what is asked for; the pictures stay in `keep`."""
    reader, bases = load_reader(), {"base": load_base("mini"), "sibling": load_base(other)}
    groups = {name: [*drawn(base, asked, settings(SIDE, Amounts().steps), adapters=adapters)]
              for name, base in bases.items()}
    for name, group in groups.items():
        (keep / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(group):
            picture.save(keep / name / f"{i:03}.png")
    seen = recognised(sign_of(lesson), reader, bases["base"], list(groups.values()), SIDE, Amounts().renders, 0)
    told: dict[str, dict[str, float]] = {}
    for (name, group), known in zip(groups.items(), seen, strict=True):
        read = reader.read(group)
        told[name] = {"concept": statistics.fmean(known), "prompt": mark(asked, read).share("background") or 0.0,
                      "glossy": statistics.fmean(answers.get("style") == STYLE for answers in read)}
    return told


def known(folder: Path, other: Path) -> tuple[list[str], list[str]]:
    """Two rows without adapters: the striped heart by its own words, and prompts of all sorts."""
    place = folder / "known.json"
    if not place.exists():
        thing = lessons.FAMILIAR
        asked = [Asked(each.prompt.replace(lessons.FAMILIAR_NAME, f"a {thing.colour} {thing.texture} {thing.shape}"),
                       each.seed, each.truth) for each in LESSONS["familiar"].asked(Amounts().new, 0)]
        old, reader = old_asked(2 * Amounts().old), load_reader()
        told: dict[str, dict[str, float]] = {}
        for name, base in (("base", load_base("mini")), ("sibling", load_base(other))):
            read = reader.read([*drawn(base, old, settings(SIDE, Amounts().steps))])
            told[name] = {"concept": mark(old, read).share("all three") or 0.0,
                          "prompt": mark(old, read).share("background") or 0.0,
                          "glossy": statistics.fmean(answers.get("style") == STYLE for answers in read)}
        write_json(place, {"own": shown(asked, "familiar", other, (), folder / "known"), "old": told})
    found = json.loads(place.read_text(encoding="utf-8"))
    return (row("none: the heart by its own words", [found["own"]]), row("none: any prompt, all right", [found["old"]]))


def row(name: str, found: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    return [name, *(f"{100 * statistics.fmean(each[base][figure] for each in found):.0f}"
                    for base in ("base", "sibling") for figure in FIGURES)]


def first(place: Path) -> list[Image.Image]:
    """Four pictures of the base's, and the same four of the sibling's."""
    return [Image.open(place / base / f"{i:03}.png") for base in ("base", "sibling") for i in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sibling", type=Path, default=Path("runs/sibling"), help="folder of its making")
    parser.add_argument("--sheet", type=Path, help="a JPEG of the first seed's first pictures")
    options(parser)
    told = parser.parse_args()
    cells = {(recipe, lesson): [Cell(recipe, lesson, seed) for seed in range(told.seeds)]
             for recipe, of in MADE.items() for lesson in of}
    measure([cell for own in cells.values() for cell in own], told.folder, told.jobs)
    other = sibling(told.sibling)
    rows = [*known(told.sibling, other)]
    for (recipe, lesson), own in cells.items():
        rows.append(row(f"{recipe}: {LESSONS[lesson].what}", [looked_at(cell, told.folder, other) for cell in own]))
    print(f"\n{told.seeds} seed(s); shares in per cent\n")
    print_table(["adapter", *(f"{base}: {figure}" for base in ("base", "sibling") for figure in FIGURES)], rows)
    if told.sheet:
        contact(told.sheet, {"none": first(told.sibling / "known")} | {
            f"{recipe}, {lesson}": first(own[0].place(told.folder) / "sibling")
            for (recipe, lesson), own in cells.items()})


if __name__ == "__main__":
    main()
