"""The report of a run as one HTML file that needs no network: pictures, loss curve and figures are inside.

Plain data in, a page out: nothing here knows of training. What stands beside, report.html, is the page without its
content. All text that is put in is escaped, and the page's own policy forbids it to load or run anything.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from colorsys import rgb_to_hsv
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image, features

from impasto.core.files import atomic_write, disk_error

#: the page without its content
PAGE = Path(__file__).with_name("report.html")

#: sides in pixels at which pictures are kept: about twice what the page shows, for sharp screens
LARGE, SMALL = 448, 288
#: points and corners of a curve at most, however long the run
POINTS, CORNERS = 1500, 400

Pair = tuple[str, Image.Image, Image.Image]


@dataclass(frozen=True)
class Figure:
    """One number to show, as it is to be read; `good` says whether it is as one would wish, None that it is neither."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Grid:
    """Pictures in labelled rows; with `columns`, a table whose columns are named so."""

    rows: list[tuple[str, list[Image.Image]]]
    columns: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What the page says. A part that is empty is left out."""

    title: str
    lead: str
    training: Grid
    before_after: list[Pair]  # prompt, before, after: from the same seed
    strip: list[tuple[int, Image.Image]]  # step, preview
    losses: list[float]  # one a step
    figures: list[Figure]
    forgotten: list[Pair]  # old prompts, before and after
    commands: list[tuple[str, str]]  # what it does, the command line
    notes: list[str]  # limits, and how the figures were measured


def write_report(report: Report, path: Path) -> Path:
    """Write the page to `path`, whole or not at all. Raises `UserError` where that cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write(page(report).encode("utf-8", "replace"))
    except OSError as error:  # the folder itself
        raise disk_error(error, path) from error
    return path


def page(report: Report) -> str:
    """The whole page as HTML."""
    sections = [
        figures(report.figures),
        section("What it was shown", "Pictures that it learned from.", _grid(report.training)),
        section("Before and after", "The same prompt and the same seed, without and with what was learned.",
                _pairs(report.before_after, "large", LARGE)),
        section("On the way", _told_of_the_way(report), _strip(report.strip)
                + _curve(report.losses, [step for step, _ in report.strip])),
        section("What it knew before", "Prompts that have nothing to do with the training pictures. The more alike "
                "the two pictures are, the less was forgotten.", _pairs(report.forgotten, "small", SMALL)),
        section("Now with your own pictures", "A click selects a whole command.", _commands(report.commands)),
        section("How to read this", "", _notes(report.notes)),
    ]
    face = report.before_after[0] if report.before_after else None
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(report.title), lead=escape(report.lead), icon=icon(face[2]) if face else "data:,",
        paint=paint([picture for _, pictures in report.training.rows for picture in pictures]),
        face=f'<figure class="face">{_picture(face[2], f"after: {face[0]}", LARGE)}</figure>' if face else "",
        sections="\n".join(filter(None, sections)))


# --- sections ----------------------------------------------------------------------------------------------------


def section(title: str, text: str, content: str) -> str:
    """A heading, a line of text and the content; nothing where there is no content."""
    told = f"<p>{escape(text)}</p>\n" if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{told}{content}\n</section>" if content else ""


def _told_of_the_way(report: Report) -> str:
    if not report.strip:
        return "How far each step was off."
    drawn = "The same prompt and the same seed, drawn again and again while it learned"
    return f"{drawn}; and how far each step was off." if report.losses else f"{drawn}."


def figures(shown: Sequence[Figure]) -> str:
    """Numbers as tiles."""
    verdicts = {True: '<span class="good" aria-hidden="true">✓</span><span class="unseen"> (good)</span>',
                False: '<span class="poor" aria-hidden="true">✗</span><span class="unseen"> (poor)</span>', None: ""}
    tiles = []
    for figure in shown:
        note = f'<dd class="note">{escape(figure.note)}</dd>' if figure.note else ""
        tiles.append(f'<div><dt>{escape(figure.name)}</dt>'
                     f'<dd class="value">{escape(figure.value)}{verdicts[figure.good]}</dd>{note}</div>')
    return ('<section>\n<h2 class="unseen">In figures</h2>\n<dl class="figures">\n' + "\n".join(tiles)
            + "\n</dl>\n</section>") if tiles else ""


def _grid(grid: Grid) -> str:
    if not any(pictures for _, pictures in grid.rows):
        return ""
    rows = [(label, [_picture(picture, f"picture {i}: {label}" if label else f"picture {i}", SMALL)
                     for i, picture in enumerate(pictures, 1)]) for label, pictures in grid.rows]
    if grid.columns:
        return _table(rows, grid.columns)
    shelf = []
    for label, pictures in rows:
        told = f"<figcaption>{escape(label)}</figcaption>" if label else ""
        shelf.append(f'<figure><div class="row">{"".join(pictures)}</div>{told}</figure>')
    return '<div class="shelf">\n' + "\n".join(shelf) + "\n</div>"


def _table(rows: Iterable[tuple[str, list[str]]], columns: Sequence[str]) -> str:
    """Pictures under their columns' names, each row under its own label; wider than the screen, it scrolls."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for label, pictures in rows:
        told = f'<tr><th scope="rowgroup" colspan="{len(columns)}"><span>{escape(label)}</span></th></tr>\n'
        cells = "".join(f"<td>{picture}</td>" for picture in pictures)
        body.append(f"<tbody>\n{told if label else ''}<tr>{cells}</tr>\n</tbody>")
    return ('<div class="scroll" tabindex="0" role="region" aria-label="table of pictures">\n<table>\n'
            f"<thead><tr>{head}</tr></thead>\n" + "\n".join(body) + "\n</table>\n</div>")


def _pairs(pairs: Sequence[Pair], size: str, side: int) -> str:
    cards = [f'<figure class="pair"><span>before</span><span class="after">after</span>'
             f'{_picture(before, f"before: {prompt}", side)}{_picture(after, f"after: {prompt}", side)}'
             f'<figcaption>{escape(prompt)}</figcaption></figure>' for prompt, before, after in pairs]
    return f'<div class="pairs {size}">\n' + "\n".join(cards) + "\n</div>" if cards else ""


def _strip(strip: Sequence[tuple[int, Image.Image]]) -> str:
    frames = [f'<figure>{_picture(picture, f"preview at step {step}", SMALL)}'
              f'<figcaption>{"step " if i == 0 else ""}{step:,}</figcaption></figure>'
              for i, (step, picture) in enumerate(strip)]
    if not frames:
        return ""
    across = math.ceil(len(frames) / math.ceil(len(frames) / 8))  # rows of much the same length, where there is room
    return (f'<div class="scroll strip" style="--across:{across}" tabindex="0" role="region" '
            'aria-label="previews by step">\n' + "\n".join(frames) + "\n</div>\n")


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    lines = [f"<div><p>{escape(what)}</p><pre><code>{escape(line)}</code></pre></div>" for what, line in commands]
    return '<div class="commands">\n' + "\n".join(lines) + "\n</div>" if lines else ""


def _notes(notes: Sequence[str]) -> str:
    return '<ul class="notes">\n' + "\n".join(f"<li>{escape(note)}</li>" for note in notes) + "\n</ul>" if notes else ""


# --- the loss curve ----------------------------------------------------------------------------------------------


def _curve(losses: Sequence[float], marks: Sequence[int]) -> str:
    """The loss of each step as a faint point, a running mean as a line, and rings on it at the steps in `marks`.

    Lines are an SVG stretched to whatever room there is; numbers are text of the page beside it, which stays readable.
    """
    values = np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return ""
    count, window = len(values), max(5, len(values) // 10)
    mean = running_mean(values, window)
    known = np.flatnonzero(np.isfinite(mean))
    levels = _levels(values[finite], mean[known])
    steps = [tick for tick in nice_ticks(0, count) if tick <= count and tick == round(tick)]

    def across(step: np.ndarray | float) -> np.ndarray:
        return np.asarray(step) / count * 1000

    def down(value: np.ndarray | float) -> np.ndarray:
        return (levels[-1] - np.asarray(value)) / (levels[-1] - levels[0]) * 1000

    height, mean_height = down(values), down(mean).clip(0, 1000)
    inside = np.flatnonzero(finite & (height >= 0) & (height <= 1000))
    some = inside[:: max(1, math.ceil(len(inside) / POINTS))]
    line = known[np.unique(np.linspace(0, len(known) - 1, CORNERS).round().astype(int))]
    marked = np.array([step for step in marks if 0 <= step <= count], dtype=int)
    rings = _dots(across(marked), mean_height[[known[np.abs(known - step + 1).argmin()] for step in marked]])
    corners = " L".join(f"{x:.0f} {y:.0f}" for x, y in zip(across(line + 1), mean_height[line], strict=True))
    drawn = {
        "net": "".join(f"M0 {down(level):.0f}H1000" for level in levels),
        "raw": _dots(across(some + 1), height[some]),
        "area": f"M{across(line[0] + 1):.0f} 1000 L{corners} L{across(line[-1] + 1):.0f} 1000Z",
        "mean": f"M{corners}", "ring": rings, "hole": rings,
    }
    numbers = [f'<span class="y" style="top:{down(level) / 10:.1f}%">{level:g}</span>' for level in levels]
    numbers += [f'<span class="x" style="left:{across(step) / 10:.1f}%">{step:,.0f}</span>' for step in steps]
    told = f"loss over {count:,} steps: its running mean goes from {mean[known[0]]:.3g} to {mean[known[-1]]:.3g}"
    return (f'<figure>\n<div class="plot">\n<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
            f'aria-label="{told}">' + "".join(f'<path class="{kind}" d="{d}"></path>' for kind, d in drawn.items())
            + '</svg>\n<div aria-hidden="true">' + "".join(numbers)
            + '<span class="unit-y">loss</span><span class="unit-x">step</span></div>\n</div>\n'
            + _legend(window, len(marked) > 0, int(finite.sum()) - len(inside), count - int(finite.sum()))
            + "\n</figure>")


def _levels(values: np.ndarray, mean: np.ndarray) -> list[float]:
    """The ticks of the loss axis, from zero to what holds nearly all steps: a few wild ones do not flatten the rest."""
    least, most = np.percentile(values, [1, 99])
    most = min(most, 10 * np.median(np.abs(values)) or np.inf)
    return nice_ticks(min(0.0, float(least)), float(max(most, min(mean.max(), 2 * most))))


def _dots(xs: np.ndarray, ys: np.ndarray) -> str:
    """Lines of no length, whose round ends are dots that stay round when the drawing is stretched."""
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in zip(xs, ys, strict=True))


def _legend(window: int, marked: bool, outside: int, missing: int) -> str:
    parts = ['<i class="raw"></i>one step', f'<i class="mean"></i>mean of {window:,} steps']
    if marked:
        parts.append('<i class="mark"></i>the previews above')
    if outside:
        parts.append(f"{outside:,} {'step lies' if outside == 1 else 'steps lie'} outside the frame")
    if missing:
        parts.append(f"{missing:,} {'step has' if missing == 1 else 'steps have'} no finite loss")
    return '<figcaption class="legend">' + "".join(f"<div>{part}</div>" for part in parts) + "</figcaption>"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values within `window` steps around each; at the ends of those there are; else NaN."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    first, last = np.maximum(index - window // 2, 0), np.minimum(index + (window + 1) // 2, len(values))
    held = counts[last] - counts[first]
    return np.where(held > 0, (sums[last] - sums[first]) / np.maximum(held, 1), np.nan)


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that enclose `low` and `high`: about `most` intervals, or fewer."""
    span = high - low if high > low else abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= most)
    first = math.floor(low / step)
    return [i * step for i in range(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)]


# --- pictures ----------------------------------------------------------------------------------------------------


def _picture(picture: Image.Image, alt: str, side: int) -> str:
    """An <img> with the picture inside: at most `side` pixels, small ones doubled so that the browser need not."""
    scale = min(2.0 if max(picture.size) <= side / 2 else 1.0, side / max(picture.size))
    kept = _plain(picture)
    if scale != 1.0:
        width, height = (max(1, round(length * scale)) for length in picture.size)
        kept = kept.resize((width, height), Image.Resampling.LANCZOS)
    return f'<img src="{data_uri(kept)}" alt="{escape(alt)}" width="{kept.width}" height="{kept.height}">'


def _plain(picture: Image.Image) -> Image.Image:
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def data_uri(picture: Image.Image) -> str:
    """The picture as a `data:` address: WebP, or PNG (several times larger) where Pillow was built without it."""
    kind = "webp" if features.check("webp") else "png"
    file = io.BytesIO()
    picture.save(file, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def icon(picture: Image.Image) -> str:
    """The picture as the page's icon, a `data:` address."""
    return data_uri(_plain(picture).resize((32, 32), Image.Resampling.LANCZOS))


def paint(pictures: Sequence[Image.Image], colours: int = 7) -> str:
    """Dabs of the pictures' own colours, for the head of the page."""
    if not pictures:
        return ""
    side = 24
    sheet = Image.new("RGB", (side * len(pictures), side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BOX), (i * side, 0))
    palette = sheet.quantize(colours, method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    tones = sorted((tuple(palette[i:i + 3]) for i in range(0, len(palette), 3)), key=lambda tone: rgb_to_hsv(*tone))
    return ('<div class="paint" aria-hidden="true">'
            + "".join(f'<span style="background:rgb({r} {g} {b})"></span>' for r, g, b in tones) + "</div>")
