"""All shards of a run as one table of samples: read once each, then mapped; what of it can be used, and what cannot.

Samples are numbered through all shards, in the order of `data.shards`. Nothing here holds an object a sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import filelock
import numpy as np

from impasto.core.errors import UserError
from impasto.core.files import cache_dir
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.data.buckets import Placement, bucket_sizes, place, too_small
from impasto.data.caption_files import tidy
from impasto.data.dataset import Problem, Size
from impasto.data.options import DataOptions
from impasto.data.shards.access import Shard, expanded, labels, reached
from impasto.data.shards.index import CAPTIONS, Index, Status, index_name, open_index
from impasto.data.shards.read import read_shard

#: samples that cannot be used are named in an error up to so many
NAMED = 20
#: servers that are asked about a shard at once
ASKING = 8
#: seconds between two looks at a shard that another process is reading
LOOK = 0.5


class Use(IntEnum):
    """Whether a sample is learned from, and if not, why: `Status`, and what hangs on the recipe."""

    USED = 0
    NO_PICTURE = 1
    BROKEN = 2
    TWICE = 3
    CUT = 4
    TOO_SMALL = 5
    NO_CAPTION = 6


@dataclass(frozen=True)
class Table:
    """The samples of all shards. `starts[i]` is the number of shard i's first sample, `starts[-1]` how many there are.
    """

    shards: list[Shard]
    indexes: list[Index]
    labels: list[str]
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, number: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def name(self, shard: int, row: int) -> str:
        """What a sample is called in messages: shard-0003.tar/000017.jpg."""
        return f"{self.labels[shard]}/{self.indexes[shard].words(row).name}"

    def column(self, name: str, numbers: np.ndarray | None = None) -> np.ndarray:
        """A column through all shards, in memory; of the samples of ascending `numbers` alone where they are given."""
        if numbers is None:
            return np.concatenate([index[name] for index in self.indexes])
        edges = np.searchsorted(numbers, self.starts)
        return np.concatenate([self.indexes[i][name][numbers[edges[i]:edges[i + 1]] - self.starts[i]]
                               for i in range(len(self.shards))])


def index_folder(data: DataOptions) -> Path:
    """Where indexes, and shards that had to be fetched, lie: beside the cache."""
    return (Path(data.cache) if data.cache else cache_dir()) / "shards"


def open_table(data: DataOptions, report: Reporter = SILENT) -> Table:
    """All shards of `data.shards`; those that are not known yet, or have changed, are read.

    Several processes share the reading: each takes the next shard that no other has begun. Raises `UserError`.
    """
    folder = index_folder(data)
    names = expanded(data.shards or [])
    with report.phase("finding the shards", len(names), "shards") as advance, \
            ThreadPoolExecutor(ASKING, thread_name_prefix="finding") as pool:
        shards = []
        for shard in pool.map(lambda name: reached(name, folder, report), names):
            shards.append(shard)
            advance(1)
    found: dict[int, Index] = {}
    new = []
    for i, shard in enumerate(shards):
        index = _known(shard, folder)
        if index is None:
            new.append(i)
        else:
            found[i] = index
    if new:
        with report.phase("reading new shards", None, "samples") as advance:
            while new:
                left = []
                for i in new:
                    index = _read(shards[i], folder, advance)
                    if index is None:
                        left.append(i)
                    else:
                        found[i] = index
                if len(left) == len(new):
                    time.sleep(LOOK)
                new = left
    indexes = [found[i] for i in range(len(shards))]
    starts = np.cumsum([0, *map(len, indexes)], dtype=np.int64)
    if not starts[-1]:
        raise UserError("there are no samples in these shards", where=", ".join(names[:3]),
                        fix="say where the shards are: data.shards=…")
    return Table(shards, indexes, labels(shards), starts)


def _known(shard: Shard, folder: Path) -> Index | None:
    """The index of a shard that has not changed since."""
    index, stamp = open_index(folder / index_name(shard.name)), shard.stamp()
    return index if index is not None and stamp is not None and index.facts["stamp"] == stamp else None


def _read(shard: Shard, folder: Path, advance: Advance) -> Index | None:
    """Read a shard, unless another process is at it: then None."""
    path = folder / index_name(shard.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    try:
        index = _known(shard, folder)  # another process may have been at it just now
        if index is None:
            read_shard(shard, advance, path, shard.stamp())
            index = open_index(path)
            assert index is not None, "what has just been written"
        return index
    finally:
        lock.release()


# --- what of it can be used --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What of a table a recipe uses. `use` is (N,) of `Use`; `buckets[bucket[i]]` is the bucket of sample i, (N,)."""

    table: Table
    data: DataOptions
    use: np.ndarray
    bucket: np.ndarray
    buckets: list[Size]

    @property
    def used(self) -> np.ndarray:
        """Numbers of the samples that can be used, ascending."""
        return np.flatnonzero(self.use == Use.USED)

    def cuts(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of samples that have a bucket, by ascending numbers (N,): the share of area cut off and the enlargement."""
        height, width = (self.table.column(name, numbers).astype(np.float64) for name in ("height", "width"))
        tall, wide = np.array(self.buckets, np.float64).reshape(-1, 2)[self.bucket[numbers]].T
        return (1 - np.minimum(width * tall, height * wide) / np.maximum(width * tall, height * wide),
                np.maximum(tall / height, wide / width))

    def size(self, number: int) -> Size:
        """Of a sample's picture; zeros where there is none, or a broken one."""
        shard, row = self.table.find(number)
        index = self.table.indexes[shard]
        return int(index["height"][row]), int(index["width"][row])

    def placement(self, number: int) -> Placement | None:
        """How a sample is cut; None where it is too small, or has no picture."""
        size = self.size(number)
        return place(size, self.data, bucket_sizes(self.data)) if min(size) else None

    def name(self, number: int) -> str:
        """What a sample is called in messages."""
        return self.table.name(*self.table.find(number))

    def caption(self, number: int) -> str:
        """A sample's caption, as it is read."""
        shard, row = self.table.find(number)
        return caption_of(self.table.indexes[shard], row, self.data)

    def problems(self) -> Iterator[tuple[int, Problem]]:
        """Each sample that cannot be used, with why."""
        for number in np.flatnonzero(self.use).tolist():
            shard, row = self.table.find(number)
            yield number, Problem(self.table.name(shard, row), self.reason(number))

    def reason(self, number: int) -> str:
        """Why a sample cannot be used."""
        shard, row = self.table.find(number)
        index, use = self.table.indexes[shard], Use(int(self.use[number]))
        words = index.words(row)
        if use is Use.TOO_SMALL:
            return too_small((int(index["height"][row]), int(index["width"][row])), self.data)
        if use is Use.NO_CAPTION:
            kinds = kinds_read(self.data)
            if words.reason:
                return words.reason
            return f"has no caption (no {' or '.join(f'.{kind}' for kind in kinds)} with words in it)"
        return words.reason


def kinds_read(data: DataOptions) -> list[str]:
    """Members that are looked at for captions, the first ones before the others."""
    return [kind for kind in CAPTIONS if data.caption_source in ("auto", kind)]


def surveyed(table: Table, data: DataOptions) -> Survey:
    """What of the samples a recipe can use, and each one's bucket."""
    sizes = bucket_sizes(data)
    numbers = {size: i for i, size in enumerate(sizes)}
    known: dict[int, int] = {}  # height and width as one number -> bucket, -1 for too small
    kinds = sum(1 << CAPTIONS.index(kind) for kind in kinds_read(data))
    uses, buckets = [], []
    for index in table.indexes:
        use = index["status"].astype(np.uint8)
        packed = (index["height"].astype(np.int64) << 32) | index["width"]
        different, inverse = np.unique(packed, return_inverse=True)
        own = np.full(len(different), -1, np.int32)
        for i, value in enumerate(different.tolist()):
            if value and (bucket := known.get(value)) is None:
                placed = place((value >> 32, value & 0xFFFFFFFF), data, sizes)
                bucket = known[value] = -1 if placed is None else numbers.setdefault(placed.bucket, len(numbers))
            own[i] = known.get(value, -1)
        bucket = own[inverse.reshape(-1)]
        use[(use == Status.GOOD) & (bucket < 0)] = Use.TOO_SMALL
        if data.caption is None:
            wordless = (index["said"] & kinds) == 0
            if data.missing_captions == "empty":
                wordless &= (index["unread"] & kinds) != 0
            use[(use == Use.USED) & wordless] = Use.NO_CAPTION
        uses.append(use)
        buckets.append(bucket)
    return Survey(table, data, np.concatenate(uses), np.concatenate(buckets), list(numbers))


def caption_of(index: Index, row: int, data: DataOptions) -> str:
    """A sample's caption: the first of the kinds that are read; with `data.wildcards` its lines are kept apart."""
    if data.caption is not None:
        return "\n".join(tidy(data.caption)) if data.wildcards else data.caption
    said = index.words(row).captions
    text = next((said[kind] for kind in kinds_read(data) if said.get(kind)), "")
    return text if data.wildcards else text.replace("\n", " ")


def refuse_samples(survey: Survey) -> list[str]:
    """One `UserError` that names what cannot be used, or lines for the user where the recipe leaves it out."""
    counts = np.bincount(survey.use, minlength=len(Use))
    bad = int(counts[1:].sum())
    if not bad:
        return []
    if survey.data.bad_samples == "skip":
        if bad == len(survey.use):
            raise UserError("none of the samples can be used", where=survey.table.labels[0],
                            fix="impasto dataset check says why")
        what = ", ".join(f"{counts[use]:,} {WORDS[use]}" for use in Use if use and counts[use])
        return [f"samples that are left out: {what}"]
    named: Sequence[Problem] = [problem for _, problem in zip(range(NAMED), (p for _, p in survey.problems()),
                                                              strict=False)]
    fix = "mend or take out what is wrong, or leave it out of the run with data.bad_samples=skip"
    if bad == 1:
        raise UserError(named[0].reason, where=named[0].name, fix=fix if survey.use.max() != Use.CUT else
                        "fetch or make the shard again, or do without the rest of it with data.bad_samples=skip")
    lines = "".join(f"\n  {problem.name}: {problem.reason}" for problem in named)
    more = f"\n  and {bad - NAMED:,} more (impasto dataset check counts them)" if bad > NAMED else ""
    raise UserError(f"{bad:,} samples cannot be used:{lines}{more}", where="data.shards", fix=fix)


#: what is wrong with samples, behind their number
WORDS = {Use.NO_PICTURE: "without a picture", Use.BROKEN: "whose picture cannot be read",
         Use.TWICE: "whose key was there before", Use.CUT: "cut short with their shard",
         Use.TOO_SMALL: "too small", Use.NO_CAPTION: "without a caption"}
