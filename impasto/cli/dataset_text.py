"""The text of `impasto dataset check`, for people: the verdict first, then figures, then what was found."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from impasto.cli.console import can_show
from impasto.cli.drawings import bar, columns, safe, short
from impasto.data.check import Checked, Verdict, shapes
from impasto.data.dataset import Size
from impasto.data.findings import Finding, Level
from impasto.data.shapes import Shapes
from impasto.data.wording import Tags

#: pictures named with a finding, and lines of a histogram; a refused picture is always named
NAMED = {Level.WARNING: 6, Level.NOTE: 3}
ROWS = 8
#: widest line
WIDEST = 100
HEADINGS = {Level.REFUSED: "refused", Level.WARNING: "warnings", Level.NOTE: "notes"}


def lines(checked: Sequence[Checked], verdict: Verdict, page: Path | None) -> list[str]:
    """Everything worth reading about all folders."""
    told = verdict_lines(verdict)
    for folder in checked:
        told += ["", *_folder(folder)]
    more = any(len(finding.names) > NAMED.get(finding.level, len(finding.names))
               for folder in checked for finding in folder.findings)
    if page is not None:
        told += ["", f"page: {page}"]
    elif more:
        told += ["", *wrapped("--json lists all of them, --html FILE shows them with every crop", 0)]
    return told


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict and the most important advice."""
    return [*wrapped(verdict.line, 0), *(line for advice in verdict.advice[:4] for line in wrapped(advice, 2, "-> "))]


def _folder(checked: Checked) -> list[str]:
    inventory = checked.inventory
    data = inventory.data
    found = shapes(checked)
    sides = [one.resolution for one in data.by_resolution]
    buckets = f"buckets of about {' and '.join(f'{side}x{side}' for side in sides)}, in steps of {data.bucket_step}" \
        if data.buckets else f"squares of {' and '.join(map(str, sides))}"
    told = [f"{inventory.title}: {safe(str(inventory.listing.folder))}"]
    told += wrapped(f"{len(checked.used):,} of {len(inventory.listing.pictures):,} can be used; {buckets}, "
                  f"batches of {inventory.batch}", 2)
    return told + shape_lines(found) + finding_lines(checked.findings) + tag_lines(checked.tags)


def shape_lines(found: Shapes) -> list[str]:
    """Sizes and cuts in words, then buckets and shapes as bars."""
    told = []
    if found.smallest and found.middle and found.largest:
        told += wrapped(f"{_size(found.smallest)} to {_size(found.largest)} pixels, {_size(found.middle)} in the "
                        "middle; " + ", ".join(f"{count:,} {shape}" for shape, count in found.orientations.items()), 2)
    if found.cropped_most and found.cropped_most[0] > 0:
        told += wrapped(f"cropped by {found.cropped_mean:.1%} of their area on average, at most by "
                      f"{found.cropped_most[0]:.1%} ({short(found.cropped_most[1], 40)})", 2)
    if found.enlarged_most:
        told += wrapped(f"{found.enlarged:,} enlarged, at most {found.enlarged_most[0]:.2f} times "
                      f"({short(found.enlarged_most[1], 40)})", 2)
    if found.buckets:
        told += ["", *_beside([_histogram("bucket", {_size(size): n for size, n in found.buckets.items()}),
                               _histogram("shape", found.ratios), _histogram("shorter side", found.sides)])]
    return told


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """What was found, under headings."""
    told: list[str] = []
    for level, some in itertools.groupby(findings, key=lambda finding: finding.level):
        told += ["", HEADINGS[level], *(line for finding in some for line in _finding(finding))]
    return told


def _finding(finding: Finding) -> list[str]:
    told = wrapped(finding.what, 2)
    if finding.fix:
        told += wrapped(finding.fix, 2, "-> ")
    shown = list(finding.names.items())[:NAMED.get(finding.level)]
    width = min(max((len(safe(name)) for name, _ in shown), default=0), 32)
    room = min(columns(), WIDEST) - 6 - width - 2
    for name, detail in shown:
        if finding.level is Level.REFUSED:
            told += _named(name, detail, width, room)
        else:
            told.append(f"      {short(name, 32):<{width}}  {short(detail, max(room, 12))}".rstrip())
    if more := len(finding.names) - len(shown) + finding.more:
        told.append(f"      and {more:,} more")
    return told


def _named(name: str, detail: str, width: int, room: int) -> list[str]:
    """A name and all that is to be said of it, in as many lines as that takes."""
    words = textwrap.wrap(safe(detail), max(room, 20)) or [""]
    if len(safe(name)) > width:
        return [f"      {safe(name)}", *(f"      {'':<{width}}  {line}" for line in words)]
    return [f"      {safe(name) if i == 0 else '':<{width}}  {line}".rstrip() for i, line in enumerate(words)]


def tag_lines(tags: Tags | None) -> list[str]:
    """The most frequent tags as bars, and the rare ones."""
    if tags is None:
        return []
    told = ["", "tags", *wrapped(f"{len(tags.counts):,} tags in {tags.captions:,} captions", 2)]
    most = {short(tag, 24): count for tag, count in list(tags.counts.items())[:ROWS]}
    told += [f"  {line}" for line in _bars(most, 24, 24)]
    if tags.missed:
        told += wrapped(tags.doubt, 2)
    elif tags.once:
        named = ", ".join(safe(tag) for tag in tags.once[:12]) + (", ..." if len(tags.once) > 12 else "")
        told += wrapped(f"{len(tags.once):,} in one caption only: {named}", 2)
    return told


# --- drawing -----------------------------------------------------------------------------------------------


def _histogram(title: str, counts: Mapping[str, int]) -> list[str]:
    told = [title, *_bars(dict(list(counts.items())[:ROWS]), 12, 5, max(counts.values(), default=1))]
    return [*told, f"and {len(counts) - ROWS} more"] if len(counts) > ROWS else told


def _bars(counts: Mapping[str, int], names: int, width: int, top: int | None = None) -> list[str]:
    ascii_only = not can_show("▏▎▍▌▋▊▉█", sys.stdout)
    top = top or max(counts.values(), default=1)
    return [f"{name:<{names}} {bar(count / top, width, ascii_only=ascii_only):<{width}} {count:>5}"
            for name, count in counts.items()]


def _beside(blocks: Sequence[Sequence[str]], width: int = 24, gap: int = 3) -> list[str]:
    """Blocks of lines side by side, as many as there is room for, the others below."""
    across = max(1, (columns() - 2 + gap) // (width + gap))
    told: list[str] = []
    for start in range(0, len(blocks), across):
        rows = itertools.zip_longest(*blocks[start:start + across], fillvalue="")
        told += [("  " + (" " * gap).join(f"{cell:<{width}}" for cell in row)).rstrip() for row in rows]
    return told


def wrapped(text: str, indent: int, mark: str = "") -> list[str]:
    """A text in lines that fit the terminal; `mark` stands before the first."""
    lead = " " * indent + mark
    return textwrap.wrap(safe(text), min(columns(), WIDEST), initial_indent=lead, subsequent_indent=" " * len(lead),
                         break_on_hyphens=False)


def _size(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
