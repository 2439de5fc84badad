"""Pairs of pictures: each picture of a set, and the one that it is made of, which a base that edits is shown.

`NAME-source.png` beside `NAME.jpg`, or a folder in which each is called like its picture.
"""

from __future__ import annotations

import dataclasses
import posixpath
from collections import defaultdict
from collections.abc import Mapping

from impasto.core.progress import SILENT, Reporter
from impasto.data.dataset import (
    Listing,
    Picture,
    Problem,
    Size,
    list_folder,
    located,
    memory_of,
    normal,
    survey,
)
from impasto.data.masks import fits, without_folder, without_masks
from impasto.data.options import DataOptions

#: how the name of a picture to edit ends, before its suffix
SOURCE_SUFFIX = "-source"


def set_apart(listing: Listing, data: DataOptions) -> Listing:
    """A folder's listing without masks and pictures to edit, those beside the others in its `sources`.

    Raises `UserError` if nothing is left.
    """
    listing = without_masks(listing, data)
    if data.pairs == "none":
        return listing
    listing = without_folder(listing, data.sources, "data.sources", "pictures to edit")
    stems = {_stem(name) for name in listing.pictures}
    apart = {name for name in listing.pictures if _stem(name).endswith(SOURCE_SUFFIX)
             and _stem(name).removesuffix(SOURCE_SUFFIX) in stems}
    return dataclasses.replace(listing, pictures=[name for name in listing.pictures if name not in apart],
                               sources=sorted(apart))


def read_sources(listing: Listing, sizes: Mapping[str, Size], data: DataOptions,
                 report: Reporter = SILENT) -> tuple[dict[str, Picture], list[Problem]]:
    """The picture that each picture of a set (a listing by `set_apart`) is made of, by the name of the latter, and what
    is wrong with them, by the same names. Raises `UserError` for a `data.sources` that is no folder of pictures."""
    if data.pairs == "none":
        return {}, []
    there = list_folder(located(data.sources), "data.sources", "pictures to edit") if data.sources else \
        dataclasses.replace(listing, pictures=listing.sources)
    files: dict[str, list[str]] = defaultdict(list)
    for name in there.pictures:
        files[_stem(name).removesuffix(SOURCE_SUFFIX)].append(name)
    problems: list[Problem] = []
    wanted: dict[str, str] = {}
    for name in sizes:
        own = files.get(_stem(name), [])
        base = posixpath.basename(_stem(name))
        if len(own) == 1:
            wanted[name] = own[0]
        elif own:
            problems.append(Problem(name, f"has two pictures that it could be made of, {own[0]} and {own[1]}"))
        else:
            place = f"{base}.png in {data.sources}" if data.sources else f"{base}{SOURCE_SUFFIX}.png"
            problems.append(Problem(name, f"has no picture that it is made of ({place})"))
    looked, bad = survey(dataclasses.replace(there, pictures=sorted(set(wanted.values()))), memory_of(there.folder),
                         report, "pictures to edit")
    found, wrong = {one.name: one for one in looked}, {one.name: one.reason for one in bad}
    sources: dict[str, Picture] = {}
    for name, other in wanted.items():
        if other in wrong:
            problems.append(Problem(name, f"its source {other} {wrong[other]}"))
        elif not fits(found[other].size, sizes[name]):
            (height, width), (tall, wide) = found[other].size, sizes[name]
            problems.append(Problem(name, f"its source {other} is of another shape: {width}x{height} pixels, the "
                                    f"picture has {wide}x{tall}"))
        else:
            sources[name] = found[other]
    order = {name: i for i, name in enumerate(sizes)}
    return sources, sorted(problems, key=lambda problem: order[problem.name])


def _stem(name: str) -> str:
    return normal(posixpath.splitext(name)[0])
