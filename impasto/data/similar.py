"""Pictures that look alike: a hash of what a picture shows, and all pairs whose hashes differ in a few bits.

The hash is the signs of a picture's lowest frequencies. Scaling, compression and a change of brightness leave them
(nearly) as they are, while another picture agrees in half of them by chance. Greys alone would call the same object
on two backgrounds one picture, so that the colours of a coarse grid have to agree as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

#: side in pixels to which a picture is averaged before its frequencies are taken
SIDE = 32
#: side in cells of the grid of colours
GRID = 4
#: a picture whose greys have a standard deviation below this shows nothing that could be alike
PLAIN = 3.0
#: bits of 64 in which copies differ at most. Of photos: JPEG at quality 70 up to 2, scaled to 70 % or to 30 % up to 8,
#: a fifth brighter up to 8; different ones from 11 on
ALIKE = 8
#: least correlation of the colours of two copies
SAME_COLOURS = 0.9
#: pairs of hashes that are compared at once, and in all: a minute or two, and enough for five million pictures
AT_ONCE, PAIRS = 1 << 17, 1 << 32
#: a bucket with more members may be all one group; bits of a band that are used
CROWDED, WIDEST = 512, 22

#: DCT-II of 32 values (rows: frequencies), and the 64 lowest pairs of frequencies but (0, 0), the mean
_TURNS = np.arange(SIDE)
_DCT = np.cos(np.pi * (2 * _TURNS[None] + 1) * _TURNS[:, None] / (2 * SIDE))
_LOWEST = np.array(sorted(((u, v) for u in range(SIDE) for v in range(SIDE) if u + v),
                          key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))[:64])


def picture_hash(image: Image.Image) -> int | None:
    """64 bits, one for the sign of each low frequency of the greys; None for a picture of (nearly) one grey."""
    greys = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    if greys.std() < PLAIN:
        return None
    frequencies = (_DCT @ greys @ _DCT.T)[_LOWEST[:, 0], _LOWEST[:, 1]]
    return int.from_bytes(np.packbits(frequencies > 0).tobytes(), "big")


def grid_colours(image: Image.Image) -> bytes:
    """The mean colours of a grid over an RGB picture: 4 * 4 * 3 bytes."""
    return image.resize((GRID, GRID), Image.Resampling.BOX).tobytes()


def alike(hashes: Sequence[int | None], colours: Sequence[bytes], most: int = ALIKE) -> list[list[int]]:
    """Groups of pictures, by their numbers, which look alike; groups and their members in order. See `grouped`."""
    known = np.array([i for i, value in enumerate(hashes) if value is not None], dtype=np.int64)
    values = np.array([value for value in hashes if value is not None], dtype=np.uint64)
    tints = np.frombuffer(b"".join(colours), np.uint8).reshape(len(colours), GRID * GRID * 3)[known]
    return [known[group].tolist() for group in groups(grouped(values, tints, most)[0])]


def grouped(values: np.ndarray, colours: np.ndarray, most: int = ALIKE, pairs: int = PAIRS) -> tuple[np.ndarray, bool]:
    """The group of each of N pictures, (N,), named by its first member; and whether all pairs were looked at.

    `values` are hashes, (N,) uint64, `colours` grids, (N, 48) uint8. Two pictures look alike if their hashes differ in
    `most` bits or fewer and their colours agree. A group holds what is joined so, directly or over others. No more than
    about `pairs` pairs are compared, those whose hashes agree best first.
    """
    group = np.arange(len(values))
    for row, column in _candidates(values, most, lambda places: bool((np.diff(_roots(group, places)) == 0).all())):
        pairs -= len(row)
        if pairs < 0:
            return _roots(group, np.arange(len(values))), False
        close = np.flatnonzero(np.bitwise_count(values[row] ^ values[column]) <= most)
        row, column = row[close], column[close]
        apart = _roots(group, row) != _roots(group, column)
        row, column = row[apart], column[apart]
        same = (_normal(colours[row]) * _normal(colours[column])).sum(axis=1) >= SAME_COLOURS
        _join(group, row[same], column[same])
    return _roots(group, np.arange(len(values))), True


def groups(group: np.ndarray) -> Iterator[np.ndarray]:
    """The members, ascending, of each group of two or more, by their first ones. `group`: as `grouped` returns it."""
    order = np.argsort(group, kind="stable")
    starts = np.append(np.flatnonzero(np.diff(group[order], prepend=-1)), len(order))
    for i in np.flatnonzero(np.diff(starts) > 1).tolist():
        yield order[starts[i]:starts[i + 1]]


def ranked(members: np.ndarray, hashes: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of a group's members, by their places in it, and the bits in which each differs from the first.

    The largest stands first, then the nearest to it. `hashes` (uint64) and `areas` are those of `members`, all (M,).
    """
    first = int(np.argmax(areas))
    far = np.bitwise_count(hashes ^ hashes[first]).astype(np.int64)
    order = np.lexsort((members, far, np.arange(len(members)) != first))
    return order, far[order]


def _roots(group: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first member of the group that each place is in, while groups are trees: each place knows an earlier one."""
    found = group[places]
    while (again := group[found]).size and (again != found).any():
        found = again
    group[places] = found
    return found


def _join(group: np.ndarray, row: np.ndarray, column: np.ndarray) -> None:
    """Make one group of those of each pair."""
    while len(row):
        row, column = _roots(group, row), _roots(group, column)
        apart = row != column
        row, column = row[apart], column[apart]
        np.minimum.at(group, np.maximum(row, column), np.minimum(row, column))


def _normal(colours: np.ndarray) -> np.ndarray:
    """(N, 48), each row without its mean and of length 1: a product of two rows is their correlation."""
    rows = colours.astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


# --- pairs that may be close -------------------------------------------------------------------------------


def _candidates(values: np.ndarray, most: int, joined: Callable[[np.ndarray], bool]
                ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places, some at a time, some repeatedly: all whose values, (N,) uint64, differ in at most `most` bits.

    Multi-index hashing (Norouzi et al. 2012): bits are cut into bands, and of two such values at least one band differs
    in no more than its share of bits, so that each value is looked up with so many bits of that band flipped. Places of
    which `joined` says that they are in one group already are left out: thousands of copies make a square of pairs.
    """
    bands = _bands(len(values), most)
    for bits in range(max(reach for _, _, reach in bands) + 1):
        for low, width, _ in (band for band in bands if band[2] >= bits):
            keys = ((values >> np.uint64(low)) & np.uint64((1 << width) - 1)).astype(np.int32)
            order = np.argsort(keys, kind="stable")
            starts = np.append(0, np.cumsum(np.bincount(keys, minlength=1 << width))).astype(np.int32)
            keys = keys[order]
            for flip in (sum(1 << bit for bit in chosen) for chosen in itertools.combinations(range(width), bits)):
                if flip:  # each pair from the side whose highest flipped bit is 0
                    rows = np.flatnonzero(keys & (1 << flip.bit_length() - 1) == 0)
                    first = starts[keys[rows] ^ flip]
                    count = starts[(keys[rows] ^ flip) + 1] - first
                else:
                    rows = np.arange(len(keys))
                    first = rows + 1
                    count = starts[keys + 1] - first
                some = np.flatnonzero(count)
                yield from _pieces(order, rows[some], first[some], count[some], starts[keys[rows[some]] + 1], joined)


def _pieces(order: np.ndarray, rows: np.ndarray, first: np.ndarray, count: np.ndarray, ends: np.ndarray,
            joined: Callable[[np.ndarray], bool]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each of `rows` with `count` others from `first` on, all places in `order`, a piece at a time.

    `ends` are where the rows' own buckets end. A large bucket is taken by itself, while it is not all one group.
    """
    total = np.append(0, np.cumsum(count))
    place = 0
    while place < len(rows):
        stop = max(place + 1, int(np.searchsorted(total, total[place] + AT_ONCE, "right")) - 1)
        if count[place] > CROWDED:
            bucket_end = int(np.searchsorted(rows, ends[place]))
            others = order[first[place]:first[place] + count[place]]
            if joined(np.concatenate([order[rows[place:bucket_end]], others])):
                place = bucket_end
                continue
            stop = min(stop, bucket_end)
        own = count[place:stop]
        within = np.arange(int(own.sum())) - np.repeat(total[place:stop] - total[place], own)
        yield order[np.repeat(rows[place:stop], own)], order[np.repeat(first[place:stop], own) + within]
        place = stop


def _bands(count: int, most: int) -> list[tuple[int, int, int]]:
    """First bit, bits and how many of them may differ, for each band, as it takes the fewest steps a value."""
    ways = []
    for number in range(1, most + 2):
        edges = np.linspace(0, 64, number + 1).astype(int).tolist()
        least, more = divmod(most + 1, number)
        bands = [(low, min(high - low, WIDEST), least - (i >= more))
                 for i, (low, high) in enumerate(itertools.pairwise(edges))]
        steps = sum(math.comb(width, bits) * (1 + count / 2**width) + 2**width / max(count, 1)
                    for _, width, reach in bands for bits in range(reach + 1))
        ways.append((steps, bands))
    return min(ways)[1]
