"""What is in shards, before a run: every sample counted once, as used or by what is wrong with it, and what may hurt.

As `check` is for folders; what a run would refuse is told by the functions that it refuses with. Samples are counted
from the shards' indexes, a column at a time, and of each kind only the first are named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from impasto.core.progress import SILENT, Reporter
from impasto.data.buckets import bucket_sizes, check_sizes
from impasto.data.dataset import Size
from impasto.data.findings import MUCH_CROPPED, MUCH_ENLARGED, Finding, Level, number
from impasto.data.inventory import CELL
from impasto.data.options import DataOptions
from impasto.data.shards.index import CAPTIONS
from impasto.data.shards.table import Survey, Use, kinds_read, open_table, surveyed

#: samples that are named in a finding
NAMED = 20

#: what a run refuses: kind for machines, words, and what to do
_REFUSED = {
    Use.CUT: ("cut short", "cut short", "fetch or make the shards again"),
    Use.TWICE: ("key twice", "whose key was there before in its shard", "give each sample a key of its own, and let "
                "the members of one stand together (tar --sort=name)"),
    Use.NO_PICTURE: ("no picture", "without a picture", "take them out, or put their pictures beside them"),
    Use.BROKEN: ("unreadable", "whose picture cannot be read", "replace those pictures"),
    Use.TOO_SMALL: ("too small", "too small", "replace them by larger ones, or lower data.resolution"),
    Use.NO_CAPTION: ("no caption", "without a caption", "put a .txt beside each picture, or allow it with "
                     "data.missing_captions=empty"),
}
_SKIP = "or leave them out with data.bad_samples=skip"


@dataclass(frozen=True)
class CheckedShards:
    """What was found. Counts of samples are by `Use`, for all shards and for each."""

    survey: Survey
    batch: int
    counts: list[int]
    by_shard: list[list[int]]
    findings: list[Finding]  # refused ones first, then warnings, then notes

    @property
    def fit(self) -> bool:
        """Whether a run would begin."""
        return bool(self.counts[Use.USED]) and not any(each.level is Level.REFUSED for each in self.findings)

    @property
    def line(self) -> str:
        """Whether, in a line."""
        table, used = self.survey.table, self.counts[Use.USED]
        where = f"{number(used, 'sample')} of {number(len(table.shards), 'shard')}"
        bad = sum(self.counts) - used
        if not self.fit:
            return f"not fit to train yet: a run would refuse {number(bad, 'sample')}" if used else \
                "not fit to train: none of the samples can be used"
        return f"fit to train: {where}" + (f", and {number(bad, 'sample')} left out" if bad else "")

    @property
    def advice(self) -> list[str]:
        """What to do, the most important first."""
        wanted = Level.WARNING if self.fit else Level.REFUSED
        return list(dict.fromkeys(f"{each.kind}: {each.fix}" for each in self.findings
                                  if each.level is wanted and each.fix))

    @property
    def shapes(self) -> dict[Size, int]:
        """Samples that are used by bucket, the fullest first."""
        counts = np.bincount(self.survey.bucket[self.survey.used], minlength=len(self.survey.buckets)).tolist()
        pairs = [(size, count) for size, count in zip(self.survey.buckets, counts, strict=True) if count]
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def check_shards(data: DataOptions, batch: int, report: Reporter = SILENT) -> CheckedShards:
    """Look at all shards of a recipe, or remember them. `batch`: pictures in a micro-batch.

    Raises `UserError` for shards that cannot be read and sizes that no base could have.
    """
    check_sizes(data, CELL)
    survey = surveyed(open_table(data, report), data)
    edges = survey.table.starts.tolist()
    by_shard = [np.bincount(survey.use[begin:end], minlength=len(Use)).tolist()
                for begin, end in itertools.pairwise(edges)]
    counts = np.bincount(survey.use, minlength=len(Use)).tolist()
    found = [*_refused(survey, counts), *_copies(survey), *_cuts(survey), *_batches(survey, batch), *_captions(survey),
             *_keys(survey)]
    order = list(Level)
    return CheckedShards(survey, batch, counts, by_shard, sorted(found, key=lambda each: order.index(each.level)))


def _named(survey: Survey, numbers: Iterable[int], told: Iterable[str]) -> dict[str, str]:
    return {survey.table.name(*survey.table.find(number)): what
            for number, what, _ in zip(numbers, told, range(NAMED), strict=False)}


def _finding(survey: Survey, level: Level, kind: str, what: str, fix: str, numbers: np.ndarray,
             told: Iterable[str]) -> Finding:
    names = _named(survey, numbers.tolist(), told)
    return Finding(level, kind, f"{number(len(numbers), 'sample')} {what}", fix, names, len(numbers) - len(names))


def _refused(survey: Survey, counts: list[int]) -> Iterator[Finding]:
    skip = survey.data.bad_samples == "skip"
    for use, (kind, what, fix) in _REFUSED.items():
        if counts[use]:
            numbers = np.flatnonzero(survey.use == use)
            if use is Use.NO_CAPTION and counts[use] == sum(counts):
                fix = "give one caption for all with data.caption=…"
            yield _finding(survey, Level.WARNING if skip else Level.REFUSED, kind, f"{what}{', left out' * skip}",
                           fix if skip else f"{fix}, {_SKIP}", numbers, map(survey.reason, numbers.tolist()))


def _copies(survey: Survey) -> Iterator[Finding]:
    used = survey.used
    digests = np.ascontiguousarray(survey.table.column("digest", used)).view("V16").reshape(-1)
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    again = np.flatnonzero(firsts != np.arange(len(used)))
    if len(again):
        told = (f"of {survey.table.name(*survey.table.find(int(used[firsts[i]])))}" for i in again.tolist())
        yield _finding(survey, Level.WARNING, "copies", "with exact copies of other pictures",
                       "keep one of each: what is there twice is learned twice", used[again], told)


def _cuts(survey: Survey) -> Iterator[Finding]:
    used = survey.used
    height, width = (survey.table.column(name, used).astype(np.float64) for name in ("height", "width"))
    tall, wide = np.array(survey.buckets, np.float64)[survey.bucket[used]].T
    cropped = 1 - np.minimum(width * tall, height * wide) / np.maximum(width * tall, height * wide)
    scale = np.maximum(tall / height, wide / width)
    much = np.flatnonzero(cropped >= MUCH_CROPPED)
    much = much[np.argsort(-cropped[much], kind="stable")]
    if len(much):
        fix = "crop them by hand to what matters" if survey.data.buckets else \
            "let them keep their shape with data.buckets=true"
        yield _finding(survey, Level.WARNING, "cropped", "cropped by a quarter or more", fix, used[much],
                       (f"loses {share:.0%} of its area" for share in cropped[much]))
    large = np.flatnonzero(scale > 1)
    large = large[np.argsort(-scale[large], kind="stable")]
    if len(large):
        most = int((scale > MUCH_ENLARGED).sum())
        what = "enlarged" + (f", {most:,} more than {MUCH_ENLARGED:g} times" if most else "")
        fix = "take larger ones, lower data.resolution, or give them smaller buckets with data.upscale=never"
        yield _finding(survey, Level.WARNING if most else Level.NOTE, "enlarged", what, fix, used[large],
                       (f"{value:.2f} times" for value in scale[large]))


def _batches(survey: Survey, batch: int) -> Iterator[Finding]:
    counts = np.bincount(survey.bucket[survey.used], minlength=len(survey.buckets)).tolist()
    thin = {f"{width}x{height}": number(count, "sample") for (height, width), count
            in zip(survey.buckets, counts, strict=True) if 0 < count < batch}
    if thin:
        yield Finding(Level.WARNING, "thin buckets", f"{number(len(thin), 'bucket')} of fewer samples than a batch of "
                      f"{batch}: in their batches a picture is there twice",
                      "lower train.batch_size, or raise data.bucket_step", thin)
    known = set(bucket_sizes(survey.data))
    own = {f"{size[1]}x{size[0]}": number(count, "sample") for size, count in zip(survey.buckets, counts, strict=True)
           if count and size not in known}
    if own:
        yield Finding(Level.NOTE, "own bucket", f"{number(len(own), 'bucket')} of samples too small for any other", "",
                      own)


def _captions(survey: Survey) -> Iterator[Finding]:
    table, data = survey.table, survey.data
    if data.caption is not None:
        unread = np.flatnonzero(table.column("said"))
        if len(unread):
            yield _finding(survey, Level.WARNING, "unread captions", "with a caption that is not read, since one is "
                           "given for all", "leave data.caption out to use them", unread, itertools.repeat(""))
        return
    kinds = kinds_read(data)
    bits = sum(1 << CAPTIONS.index(kind) for kind in kinds)
    said = table.column("said") & bits
    empty = np.flatnonzero((survey.use == Use.USED) & (said == 0))
    if len(empty):
        yield _finding(survey, Level.WARNING, "empty captions", "without a caption, learned with none",
                       "put a .txt beside each picture", empty, itertools.repeat(""))
    several = np.flatnonzero((survey.use == Use.USED) & (np.bitwise_count(said) > 1))
    differ, told = [], []
    for sample in several.tolist():
        shard, row = table.find(sample)
        captions = table.indexes[shard].words(row).captions
        first, *others = [kind for kind in kinds if kind in captions]
        if any(captions[kind] != captions[first] for kind in others):
            differ.append(sample)
            if len(told) < NAMED:
                told.append(f".{first} goes before {' and '.join(f'.{kind}' for kind in others)}")
    if differ:
        yield _finding(survey, Level.WARNING, "captions differ", "of which two members say different things",
                       "choose with data.caption_source", np.array(differ), told)


def _keys(survey: Survey) -> Iterator[Finding]:
    """Keys that two shards have: names in messages then need the shard's to be told apart."""
    table = survey.table
    used = survey.used
    _, first, inverse = np.unique(table.column("key_hash", used), return_index=True, return_inverse=True)
    firsts = first[inverse.reshape(-1)]
    again = np.flatnonzero(firsts != np.arange(len(used)))
    if len(again):
        told = (f"as {table.name(*table.find(int(used[firsts[i]])))}" for i in again.tolist())
        yield _finding(survey, Level.NOTE, "same keys", "with the key of a sample in another shard", "", used[again],
                       told)


def plain(checked: CheckedShards) -> dict[str, Any]:
    """Everything, JSON-able. Sizes are [height, width]."""
    table = checked.survey.table
    names = [use.name.lower() for use in Use]

    def counted(counts: list[int]) -> dict[str, int]:
        return {"samples": sum(counts), **dict(zip(names, counts, strict=True))}

    return {
        "title": "samples", "fit": checked.fit, "data": checked.survey.data.model_dump(mode="json"),
        "batch_size": checked.batch, **counted(checked.counts),
        "findings": [{"level": each.level, "kind": each.kind, "what": each.what, "fix": each.fix, "names": each.names,
                      "more": each.more} for each in checked.findings],
        "buckets": [{"bucket": list(size), "samples": count} for size, count in checked.shapes.items()],
        "shards": [{"shard": shard.shown, **counted(counts)}
                   for shard, counts in zip(table.shards, checked.by_shard, strict=True)],
    }
