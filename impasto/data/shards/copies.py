"""Copies and near-copies among all samples that are used, from the columns of their indexes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from impasto.data.findings import Alike
from impasto.data.shards.table import Survey
from impasto.data.similar import grouped, groups, ranked

#: groups that are listed, of exact copies and of near ones, and members of a group
GROUPS, MEMBERS = 500, 50


@dataclass(frozen=True)
class Copies:
    """What is there more than once. A group's names are of samples, by `numbers`."""

    groups: list[Alike]  # exact ones first
    more: int  # groups that are not listed
    unlisted: dict[bool, int]  # pictures that are copies in those groups, of exact ones (True) and near ones
    numbers: dict[str, int]  # of the samples in `groups`
    looked: int  # different pictures among which near-copies were looked for
    whole: bool  # all pairs of them were compared

    def count(self, exact: bool) -> int:
        """How many pictures are copies of others, exact or near ones."""
        return self.unlisted[exact] + sum(len(group.names) - 1 + group.more for group in self.groups
                                          if group.exact is exact)


def copies(survey: Survey, *, near: bool = True) -> Copies:
    """Samples whose pictures have the same bytes, and of such the first alone with those that look like it.

    `near`: look for these too.
    """
    table, used = survey.table, survey.used
    digests = np.ascontiguousarray(table.column("digest", used)).view("V16").reshape(-1)
    same = firsts(digests)
    found = Copies([], 0, {True: 0, False: 0}, {}, 0, True)
    found = _with(found, survey, used, same, exact=True)
    if not near:
        return found
    distinct = used[same == np.arange(len(used))]
    hashes = table.column("hash", distinct)
    shown = np.flatnonzero(hashes)
    distinct = distinct[shown]
    group, whole = grouped(hashes[shown], table.column("colours", distinct))
    return _with(found, survey, distinct, group, exact=False, looked=len(distinct), whole=whole)


def firsts(values: np.ndarray) -> np.ndarray:
    """For each of N values the place of the first one that is equal, (N,)."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _with(found: Copies, survey: Survey, samples: np.ndarray, group: np.ndarray, *, exact: bool, looked: int = 0,
          whole: bool = True) -> Copies:
    """Those that were found before, and the groups of `samples`."""
    listed, numbers = [], dict(found.numbers)
    height, width, hashes = (survey.table.column(name, samples) for name in ("height", "width", "hash"))
    for members in itertools.islice(groups(group), GROUPS):
        order, far = ranked(members, hashes[members], height[members].astype(np.int64) * width[members])
        names = {survey.name(number): number for number in samples[members[order[:MEMBERS]]].tolist()}
        listed.append(Alike(list(names), far[:MEMBERS].tolist(), exact, max(len(members) - MEMBERS, 0)))
        numbers |= names
    copied = int((group != np.arange(len(group))).sum())
    unlisted = copied - sum(len(each.names) - 1 + each.more for each in listed)
    more = int((np.bincount(group, minlength=1) > 1).sum()) - len(listed)
    return Copies([*found.groups, *listed], found.more + more, found.unlisted | {exact: unlisted}, numbers, looked,
                  whole)
