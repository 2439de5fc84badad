"""What the captions of all samples that are used say, in one pass: counted, the odd ones found, tags by number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from impasto.core.progress import SILENT, Reporter
from impasto.data.findings import (
    ALL,
    SHARED,
    Finding,
    meant_oddities,
    odd_captions,
    shared_captions,
    tag_spellings,
)
from impasto.data.phrasing import Phrasing
from impasto.data.shards.table import Survey
from impasto.data.wording import TagCounter, Tags, are_tags, oddities

#: captions by which it is told whether all are tags: so many, evenly chosen
JUDGED = 10_000
#: captions between two signs of life
STEP = 10_000


@dataclass(frozen=True)
class Words:
    """What is known of the captions."""

    captions: int  # with words in them
    different: int
    tags: Tags | None  # None where they are sentences, or one is given for all
    findings: list[Finding]
    numbers: dict[str, int]  # of samples that are named


def words_of(survey: Survey, named: int, report: Reporter = SILENT) -> Words:
    """Read all captions once; `named` samples of each kind of finding are named. Holds 8 bytes a sample."""
    data, phrasing, used = survey.data, Phrasing.of(survey.data), survey.used
    meant = meant_oddities(data)
    if data.caption is not None:
        kinds = [kind for kind in oddities(phrasing.body(data.caption)) if kind not in meant]
        found = list(odd_captions({kind: {ALL: data.caption} for kind in kinds}, dict.fromkeys(kinds, 1)))
        return Words(len(used), min(len(used), 1), None, found, {})
    tagged = are_tags((phrasing.body(survey.caption(number)) for number in evenly(used, JUDGED).tolist()),
                      phrasing.separator)
    counter, counts = TagCounter(phrasing.separator), Counter[str]()
    hashes = np.zeros(len(used), np.int64)
    names: dict[str, dict[str, str]] = {}
    numbers: dict[str, int] = {}
    with report.phase("reading the captions", len(used), "captions") as advance:
        for place, text in enumerate(map(survey.caption, used.tolist())):
            if place % STEP == STEP - 1:
                advance(STEP)
            if not text:
                continue
            hashes[place] = hash(text) or 1  # 0 is none
            body = phrasing.body(text)
            if tagged:
                counter.add(body)
            for kind in oddities(body, tagged, phrasing.separator):
                if kind in meant:
                    continue
                counts[kind] += 1
                if counts[kind] <= named:
                    number = int(used[place])
                    name = survey.name(number)
                    names.setdefault(kind, {})[name], numbers[name] = text, number
        advance(len(used) % STEP)
    findings = list(odd_captions(names, counts))
    values, inverse, times = np.unique(hashes, return_inverse=True, return_counts=True)
    several = (times >= SHARED) & (values != 0)
    if several.any():
        places = np.flatnonzero(several[inverse.reshape(-1)])
        own = {survey.name(int(used[place])): int(used[place]) for place in places[:named].tolist()}
        numbers |= own
        findings.append(shared_captions({name: survey.caption(number) for name, number in own.items()}, len(places),
                                        int(several.sum()), "sample"))
    tags = counter.tags() if tagged else None
    if tags is not None and tags.spellings:
        findings.append(tag_spellings(tags, named))
    return Words(int((hashes != 0).sum()), int((values != 0).sum()), tags, findings, numbers)


def evenly(numbers: np.ndarray, most: int) -> np.ndarray:
    """All of them, or `most` taken at equal distances."""
    return numbers if len(numbers) <= most else numbers[np.arange(most) * len(numbers) // most]
