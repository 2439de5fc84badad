"""Contact sheets: rows of pictures with a name before each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

#: pixels of a picture's side, of the white between two, and of the names' column
SIDE, GAP, NAME = 96, 4, 200


def contact(file: Path, rows: Mapping[str, Sequence[Image.Image]]) -> None:
    """Write the sheet, a JPEG: a row a name, as wide as the longest."""
    columns = max(len(pictures) for pictures in rows.values())
    made = Image.new("RGB", (NAME + columns * SIDE, len(rows) * SIDE), "white")
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(15)
    for row, (name, pictures) in enumerate(rows.items()):
        pen.text((8, row * SIDE + SIDE // 2), name, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            small = picture.convert("RGB").resize((SIDE - GAP, SIDE - GAP))
            made.paste(small, (NAME + column * SIDE, row * SIDE + GAP // 2))
    made.save(file, quality=88)
