"""Memory as squares of 1 GiB each, in a picture: PNG or SVG, for documents and pages.

Unlike in a terminal a square that several parts share is divided exactly, from left to right. What stays free on a card
is outlined, what does not fit stands below it in broken lines. Letters say which part it is where there is room for
one, so that the picture serves in black and white too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from impasto.core.files import atomic_write
from impasto.planning.forecast import GIB, PARTS
from impasto.planning.picture import LOOKS, Column, gib

if TYPE_CHECKING:
    from PIL import ImageDraw

#: pixels of a square's side and of the gap between two; SVG's have no fixed size, PNG's are doubled
SIDE, GAP = 36, 5
#: pixels between columns and around all
APART, MARGIN = 44, 20
#: heights of letters, and of a line
SMALL, PLAIN, LINE = 13, 15, 21
INK, PALE, ALARM = "#202020", "#808080", "#b5342b"


@dataclass(frozen=True)
class Box:
    """A rectangle, filled or only outlined, whole or in broken lines."""

    x: float
    y: float
    width: float
    height: float
    fill: str = ""
    outline: str = ""
    broken: bool = False
    line: float = 1.0


@dataclass(frozen=True)
class Words:
    """Text, its foot at y; `anchor` is which of its points is at x: start, middle, end."""

    x: float
    y: float
    text: str
    size: float = PLAIN
    colour: str = INK
    anchor: str = "start"
    bold: bool = False


@dataclass
class Scene:
    """What is to be drawn, and how large that is."""

    shapes: list[Box | Words] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


def draw(columns: Sequence[Column], path: Path) -> None:
    """Write the columns beside each other at `path`, as its ending says: .png or .svg."""
    made = scene(columns)
    with atomic_write(path) as file:
        if path.suffix == ".svg":
            file.write(svg(made, "; ".join(f"{column.title}: {column.verdict()}" for column in columns)).encode())
        else:
            from PIL import Image, ImageDraw

            image = Image.new("RGB", (round(2 * made.width), round(2 * made.height)), "white")
            _paint(made, ImageDraw.Draw(image))
            image.save(file, "PNG", optimize=True)


# --- where things are ----------------------------------------------------------------------------------------


def scene(columns: Sequence[Column]) -> Scene:
    """Titles, squares and verdicts of all columns, then one legend with a column of figures below each."""
    across = 4 if max(column.squares for column in columns) <= 24 else 8
    wide = across * (SIDE + GAP) - GAP
    parts = [part for part in PARTS if any(column.parts.get(part) for column in columns)]
    names = MARGIN + 34 + 9 * max(len(PARTS[part]) for part in parts)
    titles = [textwrap.wrap(column.title, wide // 8) for column in columns]
    top = MARGIN + LINE * max(map(len, titles)) + 14
    made, lefts, bottom = Scene(), [], top
    for i, (column, title) in enumerate(zip(columns, titles, strict=True)):
        left = names + i * (wide + APART)
        lefts.append(left)
        for row, line in enumerate(title):
            made.shapes.append(Words(left, MARGIN + LINE * (row + 0.75), line, bold=True))
        bottom = max(bottom, _column(made, column, left, top, across))
    bottom = _legend(made, columns, parts, [left + wide for left in lefts], bottom + LINE)
    made.width, made.height = lefts[-1] + wide + MARGIN, bottom + MARGIN
    return made


def _column(made: Scene, column: Column, left: float, top: float, across: int) -> float:
    """A column's squares, its card around them, what does not fit below; where it ends."""
    wide = across * (SIDE + GAP) - GAP
    room = column.card.bytes if column.card else column.squares * GIB
    bottom = _squares(made, column, (0, room), left, top, across)
    if column.card:
        made.shapes.append(Box(left - 9, top - 9, wide + 18, bottom - top + 18, outline=INK, line=2))
        bottom += LINE + 9
        made.shapes.append(Words(left, bottom, column.card.name, SMALL, PALE))
    if column.total > room:
        bottom += LINE + 4
        made.shapes.append(Words(left, bottom, "does not fit:", PLAIN, ALARM, bold=True))
        bottom = _squares(made, column, (room, column.total), left, bottom + 10, across, broken=True)
    return bottom


def _squares(made: Scene, column: Column, room: tuple[int, int], left: float, top: float, across: int, *,
             broken: bool = False) -> float:
    """The squares of the bytes of `room`, from the first to the last; where they end."""
    (at, end), y = room, top
    for number in range(math.ceil((end - at) / GIB)):
        x, y = left + number % across * (SIDE + GAP), top + number // across * (SIDE + GAP)
        stop, strip = min(at + GIB, end), x
        for part, size in column.shares(at, stop):
            width = size / GIB * SIDE
            if part:
                look = LOOKS[part]
                made.shapes.append(Box(strip, y, width, SIDE, fill=look.colour))
                if width >= 12:
                    made.shapes.append(Words(strip + width / 2, y + SIDE / 2 + 5, look.letter, PLAIN, look.ink,
                                             "middle", bold=True))
            strip += width
        made.shapes.append(Box(x, y, (stop - at) / GIB * SIDE, SIDE, outline=INK if broken else PALE, broken=broken,
                               line=2 if broken else 1))
        at = stop
    return y + SIDE


def _legend(made: Scene, columns: Sequence[Column], parts: Sequence[str], rights: Sequence[float], top: float) -> float:
    """Letters, names and figures; where it ends."""
    y = top
    made.shapes += [Words(right, y + 15, "GiB", SMALL, PALE, "end") for right in rights]
    y += LINE
    for part in parts:
        look = LOOKS[part]
        made.shapes += [Box(MARGIN, y, 22, 18, fill=look.colour),
                        Words(MARGIN + 11, y + 14, look.letter, SMALL, look.ink, "middle", bold=True),
                        Words(MARGIN + 32, y + 14, PARTS[part])]
        for column, right in zip(columns, rights, strict=True):
            size = column.parts.get(part, 0)
            made.shapes.append(Words(right, y + 14, gib(size) if size >= GIB // 200 else "<0.01" if size else "-",
                                     anchor="end"))
        y += LINE + 3
    totals = [("together", [gib(column.total) for column in columns])]
    if any(column.card for column in columns):
        spare = [column.card.bytes - column.total if column.card else None for column in columns]
        totals += [("free", ["" if size is None or size < 0 else gib(size) for size in spare]),
                   ("does not fit", ["" if size is None or size >= 0 else gib(-size) for size in spare])]
    for name, figures in totals:
        if any(figures):
            made.shapes.append(Words(MARGIN + 32, y + 14, name, bold=True))
            made.shapes += [Words(right, y + 14, figure, anchor="end", bold=True)
                            for right, figure in zip(rights, figures, strict=True)]
            y += LINE
    return y


# --- drawing -------------------------------------------------------------------------------------------------


def svg(made: Scene, title: str) -> str:
    """The scene as a document of its own."""
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {made.width:g} {made.height:g}" role="img" '
             'font-family="Helvetica, Arial, sans-serif">', f"<title>{escape(title)}</title>",
             f'<rect width="{made.width:g}" height="{made.height:g}" fill="#ffffff"/>']
    for shape in made.shapes:
        if isinstance(shape, Box):
            line = f' stroke="{shape.outline}" stroke-width="{shape.line:g}"' if shape.outline else ""
            dashes = ' stroke-dasharray="5 3"' if shape.broken else ""
            lines.append(f'<rect x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" '
                         f'height="{shape.height:.2f}" fill="{shape.fill or "none"}"{line}{dashes}/>')
        else:
            weight = ' font-weight="bold"' if shape.bold else ""
            lines.append(f'<text x="{shape.x:.2f}" y="{shape.y:.2f}" font-size="{shape.size:g}" fill="{shape.colour}" '
                         f'text-anchor="{shape.anchor}"{weight}>{escape(shape.text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _paint(made: Scene, pen: ImageDraw.ImageDraw) -> None:
    """The scene at twice its size."""
    from PIL import ImageFont

    for shape in made.shapes:
        if isinstance(shape, Box):
            box = (2 * shape.x, 2 * shape.y, 2 * (shape.x + shape.width) - 1, 2 * (shape.y + shape.height) - 1)
            if shape.fill and box[2] >= box[0]:  # else it is thinner than a pixel
                pen.rectangle(box, fill=shape.fill)
            if shape.outline and shape.broken:
                _dashes(pen, box, shape.outline, round(2 * shape.line))
            elif shape.outline:
                pen.rectangle(box, outline=shape.outline, width=round(2 * shape.line))
        else:
            font = ImageFont.load_default(2 * shape.size)
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            pen.text((2 * shape.x, 2 * shape.y), shape.text, fill=shape.colour, font=font, anchor=anchor,
                     stroke_width=0.5 if shape.bold else 0)  # the font that comes with Pillow has one weight


def _dashes(pen: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: str, width: int) -> None:
    """A rectangle in broken lines, of 10 pixels and gaps of 6."""
    left, top, right, bottom = box
    for y in (top, bottom):
        for start in range(round(left), round(right), 16):
            pen.line((start, y, min(start + 10, right), y), fill=colour, width=width)
    for x in (left, right):
        for start in range(round(top), round(bottom), 16):
            pen.line((x, start, x, min(start + 10, bottom)), fill=colour, width=width)
