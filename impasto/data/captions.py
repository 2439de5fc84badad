"""Captions: which of a folder's files says what each picture shows, or one caption for all.

Beside a picture: `.txt`, `.caption`, `.json`, in this order. In its folder or the folders around it, the nearest first:
`metadata.jsonl`, `metadata.csv`, `.parquet`, kohya's merged `.json`. The first one that says anything counts, and where
a later one says otherwise, that is reported. What is wrong is an error by name: a picture without a caption unless
the recipe allows it, a caption or a row without a picture, two rows of one rank that disagree.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from impasto.data.caption_files import Row, is_merged, loss_weight, read_lines, read_table, tidy, weight_beside
from impasto.data.dataset import Listing, Problem, normal
from impasto.data.options import DataOptions

#: kinds of files beside a picture and of tables, the first ones go before the others
BESIDE, TABLES = (".txt", ".caption", ".json"), (".jsonl", ".csv", ".parquet", ".json")
#: so many names stand in one problem
NAMED = 5


@dataclass(frozen=True)
class Captions:
    """The caption of each picture by the picture's name, and what is to be said of them.

    A caption is one line; with `data.wildcards` lines are kept apart by line feeds.
    """

    texts: dict[str, str]
    problems: list[Problem] = field(default_factory=list)
    overruled: dict[str, str] = field(default_factory=dict)  # picture -> whose other caption is not used
    unread: dict[str, str] = field(default_factory=dict)  # file -> why it is not read, though nothing is missing
    weights: dict[str, float] = field(default_factory=dict)  # of pictures' losses, where a file tells one


@dataclass(frozen=True, order=True)
class Said:
    """What one file says of a picture. The smallest rank goes before the others."""

    rank: tuple[int, int, int]
    file: str
    lines: tuple[str, ...]
    weight: object = field(default=None, compare=False)  # of the picture's loss, as it stands there


def read_captions(listing: Listing, options: DataOptions) -> Captions:
    """The captions of a folder's pictures from wherever `data.caption_source` looks."""
    joiner = "\n" if options.wildcards else " "
    if options.caption is not None:
        one = joiner.join(tidy(options.caption)) if options.wildcards else options.caption
        return Captions(dict.fromkeys(listing.pictures, one))
    reader = _Reader(listing)
    wanted = options.caption_source
    reader.beside([kind for kind in BESIDE if wanted in ("auto", kind[1:])])
    if wanted in ("auto", "table"):
        reader.tables()
    texts: dict[str, str] = {}
    overruled: dict[str, str] = {}
    weights: dict[str, float] = {}
    for name in listing.pictures:
        said = sorted(reader.said[name])
        reader.weigh(name, said, weights)
        first = next((each for each in said if each.lines), None)
        if first is None:
            if name in reader.broken:
                reader.missing = True
                continue
            if options.missing_captions == "error":
                reader.problems.append(Problem(name, _missing(name, said, wanted, reader.read)))
                reader.missing = True
        texts[name] = joiner.join(first.lines) if first is not None else ""
        others = [each for each in said if each.lines and first is not None and each.lines != first.lines]
        if first is not None and others:
            overruled[name] = f"{first.file} goes before {' and '.join(each.file for each in others)}"
    return replace(reader.told(texts, overruled), weights=weights)


def _missing(name: str, said: Sequence[Said], wanted: str, tables: Sequence[str]) -> str:
    if said:
        return f"its caption {said[0].file} is empty"
    kind = BESIDE[0] if wanted == "auto" else f".{wanted}"
    beside = "" if wanted == "table" else PurePosixPath(name).with_suffix(kind).name
    places = [place for place in (beside, *tables) if place]
    return f"has no caption ({', '.join(places) or 'there is no table'})"


class _Reader:
    """What all files of a folder say, gathered one kind after the other."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.said: dict[str, list[Said]] = defaultdict(list)
        self.problems: list[Problem] = []
        self.broken: set[str] = set()  # pictures whose caption cannot be read: that is told already
        self.read: list[str] = []  # tables
        self.missing = False
        self.badly_weighed: dict[str, list[str]] = defaultdict(list)  # pictures by the file that says so
        self._deferred: dict[str, str] = {}  # files that nobody may need, and why they cannot be used
        self._pictures = {normal(name): name for name in listing.pictures}
        self._stems: dict[str, list[str]] = defaultdict(list)
        for name in listing.pictures:
            self._stems[_stem(name)].append(name)

    def beside(self, kinds: Sequence[str]) -> None:
        """Files of those kinds beside the pictures."""
        unreadable = {_stem(name) for name in self.listing.unreadable} | set(map(normal, self.listing.unreadable))
        for file in self.listing.captions:
            kind = posixpath.splitext(file)[1].lower()
            if kind not in kinds:
                continue
            stem = _stem(file)
            whole = self._pictures.get(stem)  # a.png.txt
            owners = [whole] if whole is not None else self._stems.get(stem, [])
            if not owners:
                self.problems.append(Problem(file, "is a caption of a picture that cannot be read here"
                                             if stem in unreadable else "is a caption without a picture"))
                continue
            try:
                lines = tuple(read_lines(self.listing.folder / file))
                weight = weight_beside(self.listing.folder / file)
            except (OSError, ValueError) as error:
                if kind == ".json":  # it may be about something else, where there are other captions
                    self._deferred[file] = f"cannot be read ({error})"
                else:
                    self.problems.append(Problem(file, f"cannot be read ({error})"))
                self.broken.update(owners)
                continue
            for name in owners:
                self.said[name].append(Said((BESIDE.index(kind), int(whole is None), 0), file, lines, weight))

    def tables(self) -> None:
        """Tables in the folder and the folders inside it."""
        for file in self.listing.tables:
            path, kind = self.listing.folder / file, PurePosixPath(file).suffix.lower()
            if kind == ".json" and not is_merged(path):
                continue
            try:
                rows = read_table(path)
            except (OSError, ValueError) as error:
                self._deferred[file] = f"cannot be read ({error})"
                continue
            self.read.append(file)
            depth = len(PurePosixPath(file).parts)
            self._take(file, rows, (len(BESIDE), -depth, TABLES.index(kind)), kind == ".json")

    def _take(self, file: str, rows: Sequence[Row], rank: tuple[int, int, int], loosely: bool) -> None:
        """The rows of one table, and what is wrong with them."""
        lost: list[str] = []
        places: dict[str, Row] = {}
        twice: list[str] = []
        for row in rows:
            name = self._picture(PurePosixPath(file).parent, row.name, loosely)
            if name is None:
                lost.append(row.name if loosely else f"{row.name} ({row.place})")
            elif name not in places:
                places[name] = row
            elif (places[name].lines, places[name].weight) != (row.lines, row.weight):
                twice.append(f"{name} ({places[name].place}, {row.place})")
        if loosely and not places:  # hardly meant as captions
            self._deferred[file] = f"names no picture that is here: {_some(lost)}"
        elif lost:
            self.problems.append(Problem(file, f"names pictures that are not here: {_some(lost)}"))
        if twice:
            self.problems.append(Problem(file, f"says different things of one picture: {_some(twice)}"))
        rivals: dict[str, list[str]] = defaultdict(list)
        for name, row in places.items():
            for other in self.said[name]:
                if other.rank == rank and other.lines and row.lines and list(other.lines) != row.lines:
                    rivals[other.file].append(name)
            self.said[name].append(Said(rank, file, tuple(row.lines), row.weight))
        self.problems += [Problem(file, f"disagrees with {other}, and neither goes before the other: {_some(names)}")
                          for other, names in rivals.items()]

    def weigh(self, name: str, said: Sequence[Said], weights: dict[str, float]) -> None:
        """Note what a picture's loss weighs, which the first file that tells one says, or what is wrong with it."""
        for each in said:
            try:
                weight = loss_weight(each.weight)
            except ValueError:
                self.badly_weighed[each.file].append(f"{name} ({each.weight!r})")
                return
            if weight is not None:
                weights[name] = weight
                return

    def _picture(self, folder: PurePosixPath, name: str, loosely: bool) -> str | None:
        """The picture that a row means; loosely: by the end of its path too, and without its suffix (kohya's)."""
        parts = [part for part in normal(name).replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(len(parts) if loosely else 1):
            inside = (folder / PurePosixPath(*parts[start:])).as_posix() if parts[start:] else ""
            if inside in self._pictures:
                return self._pictures[inside]
            if loosely and len(self._stems.get(inside, ())) == 1:
                return self._stems[inside][0]
        return None

    def told(self, texts: dict[str, str], overruled: Mapping[str, str]) -> Captions:
        """All of it; JSON or a table that cannot be read is wrong only where a caption is missing."""
        problems, unread = self.problems, dict(self._deferred)
        problems += [Problem(file, f"has a loss_weight that is not a number of 0 or more: {_some(names)}")
                     for file, names in self.badly_weighed.items()]
        if self.missing or any(not text for text in texts.values()):
            problems = problems + [Problem(file, reason) for file, reason in unread.items()]
            unread = {}
        return Captions(texts, problems, dict(overruled), unread)


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _stem(name: str) -> str:
    """What a picture and its caption have in common."""
    return normal(posixpath.splitext(name)[0])
