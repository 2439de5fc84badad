"""Pictures of folders, or of shards, as one HTML file that needs no network: what is wrong with them, and each as the
model sees it.

Its look is the report's; what stands beside, dataset.html, is the page without its content.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from string import Template

from PIL import Image, ImageOps

from impasto.core.errors import UserError
from impasto.core.files import atomic_write, disk_error
from impasto.core.progress import SILENT, Reporter
from impasto.data.buckets import Placement
from impasto.data.check import Verdict
from impasto.data.dataset import opened, to_rgb
from impasto.data.findings import Finding, Level, number
from impasto.data.wording import Tags
from impasto.evaluation.dataset_parts import Part, Shown
from impasto.evaluation.report import PAGE as REPORT
from impasto.evaluation.report import Figure, data_uri, figures, icon, paint, section

#: the page without its content
PAGE = Path(__file__).with_name("dataset.html")
#: longest side in pixels at which a crop is kept
SIDE = 256
#: groups of copies that are shown at most, and pictures of a group
MOST_GROUPS, MEMBERS = 40, 8
#: names of a finding, rare tags and bars that are listed at most
NAMES, RARE, BARS = 500, 80, 16
#: names that are shown without a click
FOLDED = 3

Crops = dict[str, Image.Image]


def write_page(parts: Sequence[Part], verdict: Verdict, path: Path, report: Reporter = SILENT) -> Path:
    """Draw the crops and write the page, whole or not at all. Raises `UserError` where it cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write(page(parts, verdict, report).encode("utf-8", "replace"))
    except OSError as error:  # the folder itself
        raise disk_error(error, path) from error
    return path


def page(parts: Sequence[Part], verdict: Verdict, report: Reporter = SILENT) -> str:
    """The whole page as HTML."""
    sections: list[str] = []
    first: list[Image.Image] = []
    for part in parts:
        crops = draw_crops(part, [*part.chosen, *(name for group in part.groups[:MOST_GROUPS]
                                                  for name in group.names[:MEMBERS])], report)
        first = first or [crops[name] for name in part.chosen if name in crops and name not in part.unused]
        sections += _sections(part, crops, f"{part.title.capitalize()}: " if len(parts) > 1 else "")
    head, _, rest = verdict.line.partition(": ")
    places = " and ".join(part.where for part in parts)
    advice = "".join(f"<li>{escape(line)}</li>" for line in verdict.advice)
    mosaic = _mosaic(first)
    face = f'<figure class="face"><img src="{data_uri(mosaic)}" alt="some of the pictures" width="{mosaic.width}" ' \
        f'height="{mosaic.height}"></figure>' if mosaic else ""
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(head.capitalize()), lead=escape(f"{rest[:1].upper()}{rest[1:]}. In {places}."),
        advice=f'<ul class="advice">{advice}</ul>' if advice else "", style=_style(), face=face,
        icon=icon(first[0]) if first else "data:,", paint=paint(first[:24]), sections="\n".join(filter(None, sections)))


def _style() -> str:
    """The report's own style: the two pages are to look alike."""
    text = REPORT.read_text(encoding="utf-8")
    return text[text.index("<style>") + len("<style>"):text.index("</style>")].strip()


def _sections(part: Part, crops: Crops, prefix: str) -> list[str]:
    return [
        figures(_numbers(part)),
        section(f"{prefix}What was found" if prefix else "What was found", "", _findings(part.findings)),
        section(f"{prefix}Copies", "Of each group the largest picture stands first, with the bits of 64 in which the "
                "others' hashes differ from its own.", _groups(part, crops)),
        section(f"{prefix}Sizes and shapes", "", _charts(part)),
        section(f"{prefix}Tags", "", _tags(part.tags)),
        section(f"{prefix}As the model will see them", "Each picture cut to its bucket; the small frame shows what is "
                f"kept of the whole. {part.how}".strip(), _sheet(part, crops)),
    ]


# --- how pictures look -------------------------------------------------------------------------------------------


def draw_crops(part: Part, names: Iterable[str], report: Reporter = SILENT) -> Crops:
    """The crops of those pictures, small; without those that cannot be read (any more)."""
    wanted = list(dict.fromkeys(names))
    crops: Crops = {}
    with report.phase("drawing the crops", len(wanted), part.title) as advance, \
            ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, crop in zip(wanted, pool.map(lambda name: _crop(part.shown(name), part.background), wanted),
                              strict=True):
            if crop is not None:
                crops[name] = crop
            advance(1)
    return crops


def _crop(shown: Shown, background: str) -> Image.Image | None:
    """What `data.buckets.cut` keeps of a picture, or the whole one that has no place, at most SIDE pixels."""
    if shown.size is None:
        return None
    placement = shown.placement
    try:
        with opened(shown.read()) as image:
            image.draft(None, (2 * SIDE, 2 * SIDE))
            image.load()
            upright = ImageOps.exif_transpose(image)
        whole = to_rgb(upright, background)
    except (OSError, ValueError, UserError):
        return None  # it has changed since it was looked at
    left, top, right, bottom = placement.window if placement else (0.0, 0.0, 1.0, 1.0)
    height, width = placement.bucket if placement else (whole.height, whole.width)
    scale = min(1.0, SIDE / max(height, width))
    return whole.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS,
                        box=(left * whole.width, top * whole.height, right * whole.width, bottom * whole.height),
                        reducing_gap=3.0)


def _mosaic(crops: Sequence[Image.Image], across: int = 3, side: int = 128) -> Image.Image | None:
    """Nine of the pictures as squares, four or one where there are fewer."""
    across = next((n for n in range(across, 0, -1) if n * n <= len(crops)), 0)
    if not across:
        return None
    sheet = Image.new("RGB", (across * side, across * side))
    for i in range(across * across):
        square = ImageOps.fit(crops[i * len(crops) // across**2], (side, side), Image.Resampling.LANCZOS)
        sheet.paste(square, (i % across * side, i // across * side))
    return sheet


# --- sections ----------------------------------------------------------------------------------------------------


def _numbers(part: Part) -> list[Figure]:
    found = part.shapes
    exact, near = part.copies
    size = "" if found.middle is None else f"{_size(found.middle)} in the middle"
    told = [Figure(part.title, f"{part.used:,} of {part.count:,}", "can be used", part.used == part.count),
            Figure("buckets", f"{len(found.buckets):,}", size),
            Figure("cut off", f"{found.cropped_mean:.1%}", "of their area, on average"),
            Figure("enlarged", f"{found.enlarged:,}",
                   f"at most {found.enlarged_most[0]:.2f} times" if found.enlarged_most else "none"),
            Figure("copies", f"{exact + near:,}", f"{exact:,} exact, {near:,} nearly so" if exact + near else "none",
                   None if exact + near else True)]
    if part.captions is not None:
        said, different = part.captions
        told.append(Figure("captions", f"{said:,}", f"{different:,} different", said == part.count))
    return told


def _findings(findings: Sequence[Finding]) -> str:
    told = []
    for finding in findings:
        fix = f"<p>{escape(finding.fix[:1].upper() + finding.fix[1:])}.</p>" if finding.fix else ""
        told.append(f'<div class="finding {finding.level}"><span class="level">{finding.level}</span><div>'
                    f'<h3>{escape(finding.what)}</h3>{fix}{_names(finding)}</div></div>')
    return '<div class="findings">\n' + "\n".join(told) + "\n</div>" if told else ""


def _names(finding: Finding) -> str:
    """The pictures of a finding; folded up where they are many and a run would take them."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(detail)}</dd>"
                   for name, detail in itertools.islice(finding.names.items(), NAMES))
    left = max(len(finding.names) - NAMES, 0) + finding.more
    listed = f'<dl class="names">{rows}</dl>' + (f"<p>And {left:,} more.</p>" if left > 0 else "") if rows else ""
    if len(finding.names) <= FOLDED or finding.level is Level.REFUSED and left <= 0:
        return listed
    summary = f"{len(finding.names):,} of {len(finding.names) + finding.more:,}" if finding.more else \
        f"All {len(finding.names):,} of them"
    return f"<details><summary>{summary}</summary>{listed}</details>"


def _groups(part: Part, crops: Crops) -> str:
    told = []
    for group in part.groups[:MOST_GROUPS]:
        cards = []
        for place, (name, bits) in enumerate(zip(group.names[:MEMBERS], group.distances[:MEMBERS], strict=True)):
            differs = "" if place == 0 else "the same" if group.exact else number(bits, "bit")
            size = part.shown(name).size
            told_of = " · ".join(filter(None, (_size(size) if size else "", differs)))
            cards.append(f'<figure>{_pane(name, crops)}<figcaption><div class="name">{escape(name)}</div>'
                         f"<div>{told_of}</div>"
                         "</figcaption></figure>")
        rest = len(group.names) + group.more - MEMBERS
        cards += [f"<figure><figcaption>and {rest:,} more</figcaption></figure>"] * (rest > 0)
        told.append(f'<div class="group">{"".join(cards)}</div>')
    left = max(len(part.groups) - MOST_GROUPS, 0) + part.more_groups
    more = f"<p>And {number(left, 'group')} more.</p>" if left > 0 else ""
    return f'<div class="groups">{"".join(told)}</div>{more}' if told else ""


def _charts(part: Part) -> str:
    found, batch = part.shapes, part.batch
    if not found.buckets:
        return ""
    buckets = {_size(size): count for size, count in found.buckets.items()}
    drawn = {_size(size): _outline(size) for size in found.buckets}
    return ('<div class="charts">' + _bars("Buckets", buckets, drawn, below=batch)
            + _bars("Shapes", found.ratios) + _bars("Shorter sides in pixels", found.sides) + "</div>")


def _bars(title: str, counts: Mapping[str, int], drawn: Mapping[str, str] | None = None, below: int = 0) -> str:
    """Numbers as bars; those below `below` stand out."""
    top = max(counts.values(), default=1)
    rows = [f'<dt>{(drawn or {}).get(name, "")}<span>{escape(name)}</span></dt>'
            f'<dd class="bar{" thin" if count < below else ""}" style="width:{count / top:.1%}"></dd><dd>{count:,}</dd>'
            for name, count in itertools.islice(counts.items(), BARS)]
    more = f"<p>And {len(counts) - BARS:,} more.</p>" if len(counts) > BARS else ""
    return f'<div><h3>{escape(title)}</h3><dl class="bars">{"".join(rows)}</dl>{more}</div>'


def _tags(tags: Tags | None) -> str:
    if tags is None:
        return ""
    once = ", ".join(tags.once[:RARE]) + (", …" if len(tags.once) > RARE else "")
    most = dict(list(tags.counts.items())[:BARS])
    title = f"The most frequent of {number(len(tags.counts), 'tag')} in {number(tags.captions, 'caption')}"
    if tags.missed:
        return f'<div class="charts">{_bars(title, most)}</div><p>{escape(tags.doubt)}</p>'
    rare = f'<div><h3>In one caption only: {number(len(tags.once), "tag")}</h3><p class="rare">{escape(once)}</p></div>'
    return f'<div class="charts">{_bars(title, most)}{rare if tags.once else ""}</div>'


def _sheet(part: Part, crops: Crops) -> str:
    said = part.marks
    cards = [_card(name, part.shown(name), crops, said.get(name, [])) for name in part.chosen]
    return '<div class="sheet">\n' + "\n".join(cards) + "\n</div>" if cards else ""


def _card(name: str, shown: Shown, crops: Crops, said: Sequence[tuple[Level, str]]) -> str:
    placement, caption = shown.placement, shown.caption
    cut = ""
    if placement is not None:
        off = f" · {placement.cropped:.1%} cut off" if placement.cropped else ""
        cut = f'<div class="cut">{_frame(placement)}<span>{_size(placement.bucket)}{off}</span></div>'
    words = f'<div class="words">{escape(caption)}</div>' if caption else ""
    told = "".join(f'<li class="{level}">{escape(text)}</li>' for level, text in said)
    return (f'<figure class="card">{_pane(name, crops)}<figcaption><div class="name">{escape(name)}</div>{words}{cut}'
            + (f'<ul class="marks">{told}</ul>' if told else "") + "</figcaption></figure>")


def _pane(name: str, crops: Crops) -> str:
    """A picture, or what stands in its place."""
    crop = crops.get(name)
    inner = '<div class="missing">cannot be shown</div>' if crop is None else \
        f'<img src="{data_uri(crop)}" alt="{escape(name)}" width="{crop.width}" height="{crop.height}">'
    return f'<div class="pane">{inner}</div>'


def _frame(placement: Placement) -> str:
    """A picture's outline, and in it what is kept."""
    height, width = placement.original
    left, top, right, bottom = placement.window
    unit = 22 / max(height, width)
    wide, tall = width * unit, height * unit
    x, y = (24 - wide) / 2, (24 - tall) / 2
    return (f'<svg class="frame" viewBox="0 0 24 24" aria-hidden="true">'
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"></rect>'
            f'<rect class="kept" x="{x + left * wide:.1f}" y="{y + top * tall:.1f}" '
            f'width="{(right - left) * wide:.1f}" height="{(bottom - top) * tall:.1f}"></rect></svg>')


def _outline(size: tuple[int, int]) -> str:
    """A rectangle of that shape."""
    height, width = size
    unit = 22 / max(height, width)
    return (f'<svg class="shape" viewBox="0 0 24 24" aria-hidden="true"><rect x="{12 - width * unit / 2:.1f}" '
            f'y="{12 - height * unit / 2:.1f}" width="{width * unit:.1f}" height="{height * unit:.1f}"></rect></svg>')


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}×{size[0]}"
