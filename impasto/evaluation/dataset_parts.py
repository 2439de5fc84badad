"""What the page of `dataset_page` shows: a folder, or shards, as one part of it, and which pictures are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from impasto.data.buckets import Placement
from impasto.data.check import Checked, shapes
from impasto.data.dataset import Size
from impasto.data.findings import Alike, Finding, Level
from impasto.data.shapes import Shapes
from impasto.data.shards.check import CheckedShards
from impasto.data.shards.table import Use
from impasto.data.wording import Tags

#: pictures of a part that are shown at most
MOST = 240


@dataclass(frozen=True)
class Shown:
    """One picture. `read` gives its file's bytes and raises `OSError`, or `UserError` of a shard's."""

    size: Size | None  # None: it cannot be decoded
    placement: Placement | None
    caption: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Part:
    """One folder, or shards. Pictures go by their names."""

    title: str  # pictures, class pictures, samples
    where: str
    findings: Sequence[Finding]
    groups: Sequence[Alike]
    more_groups: int  # that are not among them
    copies: tuple[int, int]  # pictures that are exact copies of others, and near ones
    shapes: Shapes
    tags: Tags | None
    captions: tuple[int, int] | None  # with words, and how many different ones; None where one is given for all
    count: int
    used: int
    batch: int
    background: str
    chosen: Sequence[str]  # for the sheet, in order
    how: str  # what is said of the choice; may be empty
    unused: frozenset[str]  # of those chosen
    shown: Callable[[str], Shown]

    @property
    def marks(self) -> dict[str, list[tuple[Level, str]]]:
        """What is to be said of each picture, or file, the worst first."""
        found: dict[str, list[tuple[Level, str]]] = {}
        for finding in self.findings:
            for name, detail in finding.names.items():
                plain = finding.kind.startswith("caption") or finding.kind == "shared captions"  # the caption itself
                told = detail if finding.level is Level.REFUSED else \
                    finding.kind if plain or not detail else f"{finding.kind}: {detail}"
                found.setdefault(name, []).append((finding.level, told))
        return found


def folder_part(checked: Checked, most: int | None = None) -> Part:
    """A folder with at most `most` of its pictures (MOST unless told)."""
    inventory = checked.inventory
    pictures = inventory.listing.pictures
    told = _troubled(checked.findings)
    first = [name for level in (Level.REFUSED, Level.WARNING) for name in pictures if told.get(name) is level]
    chosen = choose(first, [name for name in pictures if name not in told], most or MOST)
    captions = [text for text in inventory.captions.values() if text]

    def shown(name: str) -> Shown:
        look = inventory.looks.get(name)
        return Shown(None if look is None else look.size, inventory.placements.get(name),
                     inventory.captions.get(name, ""), (inventory.listing.folder / name).read_bytes)

    some = f"{len(chosen)} of {len(pictures):,} are shown: those with something to say first, then some of the others."
    return Part(
        inventory.title, str(inventory.listing.folder), checked.findings, checked.groups, 0,
        (_copied(checked.groups, True), _copied(checked.groups, False)), shapes(checked), checked.tags,
        None if inventory.data.caption is not None else (len(captions), len(set(captions))), len(pictures),
        len(checked.used), inventory.batch, inventory.data.background, chosen,
        some if len(chosen) < len(pictures) else "", frozenset(checked.unused), shown)


def shards_part(checked: CheckedShards, most: int | None = None) -> Part:
    """Shards with samples that are named in a finding and others taken evenly: at most `most` (MOST unless told)."""
    survey, numbers = checked.survey, dict(checked.numbers)
    told = _troubled(checked.findings)
    first = [name for level in (Level.REFUSED, Level.WARNING) for name in sorted(numbers, key=numbers.__getitem__)
             if told.get(name) is level]
    others = np.setdiff1d(survey.used, [numbers[name] for name in first], assume_unique=True)
    chosen = choose(first, others, most or MOST)
    names = [each if isinstance(each, str) else survey.name(int(each)) for each in chosen]
    numbers = {name: int(each) for name, each in zip(names, chosen, strict=True) if not isinstance(each, str)} | numbers

    def shown(name: str) -> Shown:
        number = numbers[name]
        shard, row = survey.table.find(number)
        index = survey.table.indexes[shard]
        size, offset, length = survey.size(number), int(index["offset"][row]), int(index["size"][row])
        return Shown(size if min(size) else None, survey.placement(number), survey.caption(number),
                     lambda: survey.table.shards[shard].read(offset, length))

    some = f"{len(names)} of {len(survey.table):,} are shown: those that are named above with something to say, then " \
        "others, taken evenly from all shards."
    return Part(
        "samples", checked.where, checked.findings, checked.copies.groups, checked.copies.more,
        (checked.copies.count(True), checked.copies.count(False)), checked.shapes, checked.words.tags,
        None if survey.data.caption is not None else (checked.words.captions, checked.words.different),
        len(survey.table), checked.counts[Use.USED], checked.batch, survey.data.background, names,
        some if len(names) < len(survey.table) else "",
        frozenset(name for name in names if survey.use[numbers[name]] != Use.USED), shown)


# --- which of many -----------------------------------------------------------------------------------------


def choose(first: Sequence[str], others: Sequence[Any] | np.ndarray, most: int) -> list[Any]:
    """Of two kinds of pictures at most `most`: where they are too many, a quarter of the room is for the others, taken
    evenly.
    """
    room = min(max(most - len(first), most // 4), len(others))
    return [*first[:most - room], *(others[i * len(others) // room] for i in range(room))]


def _troubled(findings: Iterable[Finding]) -> dict[str, Level]:
    """Pictures, and files, that are refused or warned of; the worst of each."""
    told: dict[str, Level] = {}
    for finding in findings:
        if finding.level is not Level.NOTE:
            for name in finding.names:
                told.setdefault(name, finding.level)
    return told


def _copied(groups: Iterable[Alike], exact: bool) -> int:
    return sum(len(group.names) - 1 for group in groups if group.exact is exact)
