"""Memory as squares of 1 GiB each, in a terminal: what takes them, what stays free on a card, what does not fit on it.

A square is four characters wide and two high, so that a character is an eighth of a GiB (128 MiB): it belongs to
whatever takes most of it, and what is smaller than half of one may not be seen. The legend has exact figures. In
pictures for documents (`drawn`) a square is divided exactly. Each part has a letter beside its colour, so that nothing
is lost on paper or in a pipe.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TextIO

from impasto.planning.cards import Card
from impasto.planning.forecast import GIB, PARTS

if TYPE_CHECKING:
    from rich.text import Text


class Look(NamedTuple):
    """A part's letter, and the colour of its ground."""

    letter: str
    colour: str

    @property
    def ink(self) -> str:
        """Black or white, whichever is readable on the ground (its luma, ITU-R BT.601)."""
        red, green, blue = (int(self.colour[i:i + 2], 16) for i in (1, 3, 5))
        return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#ffffff"


#: weights are blue, what training adds to them warm, what a step makes green, what the machine takes grey
LOOKS = {
    "vae": Look("V", "#a9d3ea"), "text_encoder": Look("T", "#4d94c9"), "text_encoder_2": Look("S", "#86b8dc"),
    "text_encoder_3": Look("F", "#3b7cb0"), "unet": Look("U", "#1f4e79"), "transformer": Look("M", "#1f4e79"),
    "adapter": Look("L", "#00b3a4"), "gradients": Look("G", "#f2b134"), "optimizer": Look("O", "#b5342b"),
    "ema": Look("E", "#e58f7f"), "batch": Look("B", "#d8ecb8"), "activations": Look("A", "#58a848"),
    "autocast": Look("C", "#b79ad4"), "temporaries": Look("P", "#7a5aa6"), "workspaces": Look("W", "#d0d0d0"),
    "allocator": Look("R", "#8c8c8c"), "context": Look("K", "#5a5a5a"),
}

#: characters of a square's rows, and of all of it
WIDE, EIGHTHS = 4, 8
#: rows of squares that a column has at most, where the terminal is wide enough
ROWS = 6
#: blanks between columns
APART = 3


@dataclass(frozen=True)
class Column:
    """One way to run, beside others; `parts` in bytes, as a forecast has them; without a card nothing is too much."""

    title: str
    parts: Mapping[str, int]
    card: Card | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def squares(self) -> int:
        """How many are drawn: all that is taken, and all of the card."""
        return math.ceil(max(self.total, self.card.bytes if self.card else 0) / GIB)

    def ordered(self) -> dict[str, int]:
        """What takes anything, in the order in which it is drawn."""
        return {part: self.parts[part] for part in PARTS if self.parts.get(part)}

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Each part with the bytes where it begins and ends."""
        end = 0
        for part, size in self.ordered().items():
            yield part, end, end + size
            end += size

    def shares(self, begin: int, end: int) -> list[tuple[str, int]]:
        """How many of the bytes from `begin` to `end` each part has, and "" where nothing is."""
        found = [(part, min(stop, end) - max(start, begin)) for part, start, stop in self.spans()
                 if start < end and stop > begin]
        return found + ([("", end - max(begin, self.total))] if end > self.total else [])

    def verdict(self) -> str:
        """What it takes, and whether that is there."""
        if self.card is None:
            return f"{gib(self.total)} GiB"
        spare = self.card.bytes - self.total
        return (f"{gib(self.total)} of {self.card.bytes / GIB:g} GiB, "
                + (f"{gib(spare)} free" if spare >= 0 else f"{gib(-spare)} too much"))


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def squares(columns: Sequence[Column], width: int = 80, *, ascii_only: bool = False) -> list[Text]:
    """The columns beside each other, as many as fit into `width` characters, then their legend; and so on."""
    lines: list[Text] = []
    across = _across(columns, width)
    together = max(1, min((width + APART) // (_block(across) + APART), (width - 18) // 10))
    for start in range(0, len(columns), together):
        group = columns[start:start + together]
        numbers = [str(start + i + 1) if len(columns) > 1 else "" for i in range(len(group))]
        titles = [textwrap.wrap(f"{number} {column.title}".strip(), _block(across))
                  for number, column in zip(numbers, group, strict=True)]
        high = max(map(len, titles))
        blocks = [[_text(line, "bold") for line in [*title, *[""] * (high - len(title))]]
                  + _drawn(column, across, ascii_only) for title, column in zip(titles, group, strict=True)]
        lines += [*([_text("")] if lines else []), *_beside(blocks), *_legend(group, numbers, width)]
    return lines


def show(lines: Sequence[Text], stream: TextIO) -> None:
    """Print them, coloured where `stream` is a terminal."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)


def _across(columns: Sequence[Column], width: int) -> int:
    """Squares in a row: so many that the picture is not high, but all columns are beside each other if they can be."""
    wanted = max(4, math.ceil(max(column.squares for column in columns) / ROWS))
    beside = (width + APART) // len(columns) - APART
    return max(1, min(wanted, (width - 3) // (WIDE + 1), max(4, (beside - 3) // (WIDE + 1))))


def _block(across: int) -> int:
    """Characters of a column's width: its squares, and a frame."""
    return across * (WIDE + 1) + 3


def _text(plain: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(plain, style, no_wrap=True)


def _drawn(column: Column, across: int, ascii_only: bool) -> list[Text]:
    """One column's squares, and what it comes to."""
    wide = _block(across)
    owners = [max(column.shares(i * GIB // EIGHTHS, (i + 1) * GIB // EIGHTHS), key=lambda share: share[1])[0]
              for i in range(EIGHTHS * column.squares)]
    lines: list[Text] = []
    if column.card is None:
        lines += [_text("  ") + row for row in _rows(owners, across, ascii_only)]
    else:
        end = round(column.card.bytes * EIGHTHS / GIB)
        lines += _framed(_rows(owners[:end], across, ascii_only), wide, column.card.name, ascii_only)
        if beyond := owners[end:]:
            lines += [_text(line, "bold red") for line in textwrap.wrap("does not fit:", wide)]
            lines += [_text("  ") + row for row in _rows(beyond, across, ascii_only)]
    told = (line for part in column.verdict().split(", ") for line in textwrap.wrap(part, wide))
    return [*lines, *(_text(line, "bold") for line in told)]


def _rows(owners: Sequence[str], across: int, ascii_only: bool) -> list[Text]:
    """Lines of squares, a blank one between two rows of them."""
    lines: list[Text] = []
    for start in range(0, len(owners), across * EIGHTHS):
        row = owners[start:start + across * EIGHTHS]
        lines += [_text("")] if lines else []
        for half in range(0, EIGHTHS, WIDE):
            line = _text("")
            for square in range(0, len(row), EIGHTHS):
                for owner in row[square + half:square + half + WIDE]:
                    look = LOOKS.get(owner)
                    line.append(look.letter if look else "." if ascii_only else "·",
                                f"{look.ink} on {look.colour}" if look else "dim")
                line.append(" ")
            lines.append(line)
    return lines


def _framed(rows: list[Text], wide: int, name: str, ascii_only: bool) -> list[Text]:
    """A card's outline around its squares, with its name in it."""
    corners, flat, side = ("++++", "-", "|") if ascii_only else ("┌┐└┘", "─", "│")
    name = f" {name} " if len(name) <= wide - 4 else ""
    top = _text(corners[0] + name.center(wide - 2, flat) + corners[1])
    body = []
    for row in rows:
        row = _text(side + " ") + row
        row.pad_right(wide - 1 - row.cell_len)
        body.append(row.append(side))
    return [top, *body, _text(corners[2] + flat * (wide - 2) + corners[3])]


def _beside(blocks: Sequence[list[Text]]) -> list[Text]:
    """Blocks of lines as one, the tops level."""
    lines: list[Text] = []
    widths = [max(line.cell_len for line in block) for block in blocks]
    for i in range(max(map(len, blocks))):
        whole = _text("")
        for block, width in zip(blocks, widths, strict=True):
            line = block[i].copy() if i < len(block) else _text("")
            line.pad_right(width + APART - line.cell_len)
            whole += line
        lines.append(whole)
    return lines


def _legend(columns: Sequence[Column], numbers: Sequence[str], width: int) -> list[Text]:
    """Each part's letter, name and figures in GiB, as exact as they are printed."""
    parts = [part for part in PARTS if any(column.parts.get(part) for column in columns)]
    cell = 10 if len(columns) > 1 else 9
    names = min(max([len(PARTS[part]) for part in parts], default=8), max(width - 4 - cell * len(columns), 4))
    unit = "GiB"[:names]
    lines = [_text(""), _text(f"    {unit:<{names}}" + "".join(f"{number:>{cell}}" for number in numbers), "dim")]
    for part in parts:
        look, line = LOOKS[part], _text("")
        line.append(f" {look.letter} ", f"{look.ink} on {look.colour}").append(f" {PARTS[part][:names]:<{names}}")
        for column in columns:
            size = column.parts.get(part, 0)
            line.append(f"{_small(size) if size else '-':>{cell}}")
        lines.append(line)
    together = "together"[:names]
    return [*lines, _text(f"    {together:<{names}}" + "".join(f"{gib(column.total):>{cell}}" for column in columns),
                          "bold")]


def _small(size: int) -> str:
    """GiB, with a third digit where two would hide that there is something."""
    return gib(size) if size >= GIB // 100 else f"{size / GIB:.1g}" if size >= GIB // 10000 else "<0.0001"
