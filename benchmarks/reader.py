"""How well the reader of pictures reads.

    python -m benchmarks.reader [--draw [FOLDER]]

Prints its accuracy on drawn pictures that it has not seen; and, of 200 pictures that the embedded base generated, how
often it says what a person saw in them. Those lie in `by_eye` as numbered contact sheets that --draw makes, without
their prompts, so that whoever labels them is not led; and `labels.csv` is what was seen: a row a picture, a column a
question, empty where it makes no sense, and the shape "broken" or "none" where nothing proper is there.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.common import print_table
from impasto.cli.console import RichReporter
from impasto.core.errors import UserError, nearest
from impasto.evaluation import damage
from impasto.evaluation.reader import ANSWERS, BROKEN, NONE, Reader, load_reader, oriented
from impasto.families import pictures
from impasto.families.load import load_base
from impasto.families.sample_settings import SampleSettings
from impasto.mini import world
from impasto.mini.labels import QUESTIONS
from scripts.train_reader import accuracy, draw, told

BY_EYE = Path(__file__).parent / "by_eye"
COLUMNS, ROWS, SHEETS = 8, 5, 5
SIDE, STRIP = 128, 16  # pixels of a picture's side, and of the strip above it that has its number
COUNT = COLUMNS * ROWS * SHEETS
FIRST, UNSEEN = 20_000_000, 12_000_000  # seeds of the generated pictures' scenes, and of the drawn ones
ASKED = tuple(question for question in QUESTIONS if question != "accent")  # of the person


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", nargs="?", type=Path, const=BY_EYE, metavar="FOLDER",
                        help="generate the pictures and write their sheets; nothing else")
    parser.add_argument("--base", default="mini", help="what generates them")
    chosen = parser.parse_args()
    if chosen.draw:
        write_sheets(chosen.draw, chosen.base)
        return
    reader = load_reader()
    unseen(reader)
    if (BY_EYE / "labels.csv").is_file():
        print()
        by_eye(reader, BY_EYE)
    else:
        print("\nNo pictures have been labelled by eye yet (benchmarks/by_eye/labels.csv).")


# --- drawn pictures ----------------------------------------------------------------------------------------------


def unseen(reader: Reader) -> None:
    """Print the accuracy on drawn pictures, and how many broken ones are told."""
    pixels, answers = draw(2000, UNSEEN, nothing=0.0)
    clean, softened = accuracy(reader, pixels, answers), accuracy(reader, damage.mild(pixels, 2), answers)
    print_table(["question", "drawn", "mildly damaged"],
                [[question, f"{clean[question]:.2%}", f"{softened[question]:.2%}"] for question in ANSWERS])
    print()
    print_table(["broken by", "told"], [[way, f"{share:.1%}"] for way, share in told(reader, pixels[:500]).items()])


# --- generated pictures, by eye ------------------------------------------------------------------------------------


def scenes() -> list[world.Scene]:
    """What is asked for: a fifth of pairs, and of the single objects a third of combinations never shown."""
    found = []
    for i in range(COUNT):
        pair = i % 5 == 0
        found.append(world.scene(FIRST + i, pairs=float(pair), held_out=not pair and i % 3 == 0))
    order = world.numbers("by eye").permutation(COUNT)
    return [found[i] for i in order]


def write_sheets(folder: Path, base: str) -> None:
    """Generate the pictures, and write the sheets that show them."""
    shots = [pictures.Shot(prompt, FIRST + i, prompt) for i, prompt in enumerate(map(world.caption, scenes()))]
    settings = SampleSettings(steps=20, guidance=4.0, scheduler="dpm++2m", width=SIDE, height=SIDE)
    drawn = [picture for _, picture in pictures.draw(load_base(base), shots, settings, batch=8,
                                                     report=RichReporter())]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(SHEETS):
        sheet = Image.new("RGB", (COLUMNS * SIDE, ROWS * (SIDE + STRIP)), "white")
        pen = ImageDraw.Draw(sheet)
        for i in range(number * COLUMNS * ROWS, (number + 1) * COLUMNS * ROWS):
            x, y = _place(i)
            pen.text((x + 2, y - STRIP + 2), str(i + 1), "black")
            sheet.paste(drawn[i], (x, y))
        sheet.save(folder / f"sheet-{number + 1}.jpg", quality=95, subsampling=0)


def _place(i: int) -> tuple[int, int]:
    """Left and top of picture i on its sheet."""
    row, column = divmod(i % (COLUMNS * ROWS), COLUMNS)
    return column * SIDE, row * (SIDE + STRIP) + STRIP


def from_sheets(folder: Path) -> Iterator[Image.Image]:
    """The pictures, cut out of their sheets: what was labelled."""
    for number in range(SHEETS):
        with Image.open(folder / f"sheet-{number + 1}.jpg") as sheet:
            for i in range(COLUMNS * ROWS):
                x, y = _place(i)
                yield sheet.crop((x, y, x + SIDE, y + SIDE))


def seen(file: Path) -> dict[int, dict[str, str]]:
    """What a person saw: picture number, from 1 -> question -> answer. Raises `UserError` for an unknown answer."""
    found = {}
    with open(file, encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            answers = {question: row[question].strip() for question in ASKED if row[question].strip()}
            for question, answer in answers.items():
                known = (*QUESTIONS[question], *ANSWERS[question])
                if answer not in known:
                    raise UserError(f"unknown {question} {answer!r}", where=f"{file}, picture {row['picture']}",
                                    fix=nearest(answer, known))
            found[int(row["picture"])] = _plain(answers)
    return found


def _plain(answers: dict[str, str]) -> dict[str, str]:
    """A person's answers in the reader's terms."""
    if answers["shape"] in (NONE, BROKEN):
        return {"shape": answers["shape"]}
    return oriented({"relation": NONE, **answers})


def by_eye(reader: Reader, folder: Path) -> None:
    """Print how often the reader says what the person saw, and where it does not."""
    person = seen(folder / "labels.csv")
    machine = dict(enumerate(reader.read(list(from_sheets(folder))), 1))
    asked, agreed, apart = Counter(), Counter(), []
    for number, answers in sorted(person.items()):
        for question, answer in answers.items():
            asked[question] += 1
            said = machine[number].get(question, "-")
            agreed[question] += said == answer
            if said != answer:
                apart.append([str(number), question, answer, said])
    rows = [[q, str(asked[q]), f"{agreed[q] / asked[q]:.1%}"] for q in ASKED if asked[q]]
    print_table(["question", "labels", "agreement"],
                [*rows, ["all", str(asked.total()), f"{agreed.total() / asked.total():.1%}"]])
    print()
    print_table(["picture", "question", "seen", "read"], apart)


if __name__ == "__main__":
    main()
