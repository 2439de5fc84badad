"""What is in shards, before a run: every sample counted once, as used or by what is wrong with it, and what may hurt.

As `check` is for folders; what a run would refuse is told by the functions that it refuses with. Samples are counted
from the shards' indexes, a column at a time, and of each kind only the first are named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from impasto.core.progress import SILENT, Reporter
from impasto.data.buckets import bucket_sizes, check_sizes
from impasto.data.findings import MUCH_CROPPED, MUCH_ENLARGED, Finding, Level, alike_findings, number
from impasto.data.inventory import CELL
from impasto.data.options import DataOptions
from impasto.data.shapes import Shapes, shapes_of
from impasto.data.shards.copies import Copies, copies, firsts
from impasto.data.shards.index import CAPTIONS
from impasto.data.shards.table import Survey, Use, kinds_read, open_table, surveyed
from impasto.data.shards.words import Words, words_of
from impasto.data.wording import Tags

#: samples that are named in a finding, and tags for machines
NAMED, TAGS = 20, 10_000

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
    copies: Copies
    words: Words
    numbers: dict[str, int]  # of all samples that are named

    @property
    def fit(self) -> bool:
        """Whether a run would begin."""
        return bool(self.counts[Use.USED]) and not any(each.level is Level.REFUSED for each in self.findings)

    @property
    def where(self) -> str:
        """Which shards."""
        shards = self.survey.table.shards
        return shards[0].shown + (f" and {len(shards) - 1:,} more" if len(shards) > 1 else "")

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
    def shapes(self) -> Shapes:
        """How large the pictures are, and what becomes of them."""
        survey, used = self.survey, self.survey.used
        height, width = (survey.table.column(name).astype(np.int64) for name in ("height", "width"))
        packed, times = np.unique((height << 32) | width, return_counts=True)
        sizes = {(value >> 32, value & 0xFFFFFFFF): count
                 for value, count in zip(packed.tolist(), times.tolist(), strict=True) if value}
        counts = np.bincount(survey.bucket[used], minlength=len(survey.buckets)).tolist()
        buckets = {size: count for size, count in zip(survey.buckets, counts, strict=True) if count}
        return shapes_of(sizes, buckets, *survey.cuts(used), lambda i: survey.name(int(used[i])))


def check_shards(data: DataOptions, batch: int, report: Reporter = SILENT, *, near: bool = True) -> CheckedShards:
    """Look at all shards of a recipe, or remember them. `batch`: pictures in a micro-batch; `near`: look for
    near-copies too.

    Raises `UserError` for shards that cannot be read and sizes that no base could have.
    """
    check_sizes(data, CELL)
    survey = surveyed(open_table(data, report), data)
    edges = survey.table.starts.tolist()
    by_shard = [np.bincount(survey.use[begin:end], minlength=len(Use)).tolist()
                for begin, end in itertools.pairwise(edges)]
    counts = np.bincount(survey.use, minlength=len(Use)).tolist()
    with report.phase("looking for copies", None, "pictures"):
        alike = copies(survey, near=near)
    words = words_of(survey, NAMED, report)
    named = _Named(survey)
    found = [*_refused(named, counts), *_copies(survey, alike), *_cuts(named), *_batches(survey, batch),
             *_captions(named), *words.findings, *_keys(named)]
    order = list(Level)
    return CheckedShards(survey, batch, counts, by_shard, sorted(found, key=lambda each: order.index(each.level)),
                         alike, words, words.numbers | alike.numbers | named.numbers)


@dataclass(frozen=True)
class _Named:
    """Findings about samples, and which ones they name."""

    survey: Survey
    numbers: dict[str, int] = field(default_factory=dict)

    def finding(self, level: Level, kind: str, what: str, fix: str, numbers: np.ndarray,
                told: Iterable[str]) -> Finding:
        """What is so of the samples with these numbers; the first are named, with what is told of them."""
        names: dict[str, str] = {}
        for sample, said in zip(numbers[:NAMED].tolist(), told, strict=False):
            name = self.survey.name(sample)
            names[name] = said
            self.numbers.setdefault(name, sample)
        return Finding(level, kind, f"{number(len(numbers), 'sample')} {what}", fix, names, len(numbers) - len(names))


def _refused(named: _Named, counts: list[int]) -> Iterator[Finding]:
    survey = named.survey
    skip = survey.data.bad_samples == "skip"
    for use, (kind, what, fix) in _REFUSED.items():
        if counts[use]:
            numbers = np.flatnonzero(survey.use == use)
            if use is Use.NO_CAPTION and counts[use] == sum(counts):
                fix = "give one caption for all with data.caption=…"
            yield named.finding(Level.WARNING if skip else Level.REFUSED, kind, f"{what}{', left out' * skip}",
                                fix if skip else f"{fix}, {_SKIP}", numbers, map(survey.reason, numbers.tolist()))


def _copies(survey: Survey, alike: Copies) -> Iterator[Finding]:
    yield from alike_findings(alike.groups, lambda name: survey.caption(alike.numbers[name]), NAMED, alike.unlisted)
    if not alike.whole:
        yield Finding(Level.NOTE, "not compared", f"{number(alike.looked, 'picture')} are too much alike to compare "
                      "each with each: those that agree best were, and there may be more near-copies", "", {})


def _cuts(named: _Named) -> Iterator[Finding]:
    survey, used = named.survey, named.survey.used
    cropped, scale = survey.cuts(used)
    much = np.flatnonzero(cropped >= MUCH_CROPPED)
    much = much[np.argsort(-cropped[much], kind="stable")]
    if len(much):
        fix = "crop them by hand to what matters" if survey.data.buckets else \
            "let them keep their shape with data.buckets=true"
        yield named.finding(Level.WARNING, "cropped", "cropped by a quarter or more", fix, used[much],
                            (f"loses {share:.0%} of its area" for share in cropped[much]))
    large = np.flatnonzero(scale > 1)
    large = large[np.argsort(-scale[large], kind="stable")]
    if len(large):
        most = int((scale > MUCH_ENLARGED).sum())
        what = "enlarged" + (f", {most:,} more than {MUCH_ENLARGED:g} times" if most else "")
        fix = "take larger ones, lower data.resolution, or give them smaller buckets with data.upscale=never"
        yield named.finding(Level.WARNING if most else Level.NOTE, "enlarged", what, fix, used[large],
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


def _captions(named: _Named) -> Iterator[Finding]:
    survey = named.survey
    table, data = survey.table, survey.data
    if data.caption is not None:
        unread = np.flatnonzero(table.column("said"))
        if len(unread):
            yield named.finding(Level.WARNING, "unread captions", "with a caption that is not read, since one is "
                                "given for all", "leave data.caption out to use them", unread, itertools.repeat(""))
        return
    kinds = kinds_read(data)
    bits = sum(1 << CAPTIONS.index(kind) for kind in kinds)
    said = table.column("said") & bits
    empty = np.flatnonzero((survey.use == Use.USED) & (said == 0))
    if len(empty):
        yield named.finding(Level.WARNING, "empty captions", "without a caption, learned with none",
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
        yield named.finding(Level.WARNING, "captions differ", "of which two members say different things",
                            "choose with data.caption_source", np.array(differ), told)


def _keys(named: _Named) -> Iterator[Finding]:
    """Keys that two shards have: names in messages then need the shard's to be told apart."""
    survey, used = named.survey, named.survey.used
    first = firsts(survey.table.column("key_hash", used))
    again = np.flatnonzero(first != np.arange(len(used)))
    if len(again):
        told = (f"as {survey.name(int(used[first[i]]))}" for i in again.tolist())
        yield named.finding(Level.NOTE, "same keys", "with the key of a sample in another shard", "", used[again], told)


def plain(checked: CheckedShards) -> dict[str, Any]:
    """Everything, JSON-able. Sizes are [height, width]."""
    table = checked.survey.table
    names = [use.name.lower() for use in Use]

    def counted(counts: list[int]) -> dict[str, int]:
        return {"samples": sum(counts), **dict(zip(names, counts, strict=True))}

    shapes = checked.shapes
    return {
        "title": "samples", "fit": checked.fit, "data": checked.survey.data.model_dump(mode="json"),
        "batch_size": checked.batch, **counted(checked.counts),
        "findings": [asdict(each) for each in checked.findings],
        "shapes": asdict(shapes) | {"buckets": [{"bucket": list(size), "samples": count}
                                                for size, count in shapes.buckets.items()]},
        "alike": [asdict(group) for group in checked.copies.groups], "alike_more": checked.copies.more,
        "compared": {"pictures": checked.copies.looked, "all": checked.copies.whole},
        "captions": {"captions": checked.words.captions, "different": checked.words.different},
        "tags": None if checked.words.tags is None else _plain_tags(checked.words.tags),
        "shards": [{"shard": shard.shown, **counted(counts)}
                   for shard, counts in zip(table.shards, checked.by_shard, strict=True)],
    }


def _plain_tags(tags: Tags) -> dict[str, Any]:
    """As JSON-able; of very many the most frequent alone."""
    return asdict(tags) | {"counts": dict(itertools.islice(tags.counts.items(), TAGS)), "once": tags.once[:TAGS],
                           "spellings": tags.spellings[:TAGS], "tags": len(tags.counts)}
