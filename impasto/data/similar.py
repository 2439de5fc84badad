"""Pictures that look alike: a hash of what a picture shows, and all pairs whose hashes differ in a few bits.

The hash is the signs of a picture's lowest frequencies. Scaling, compression and a change of brightness leave them
(nearly) as they are, while another picture agrees in half of them by chance. Greys alone would call the same object
on two backgrounds one picture, so that the colours of a coarse grid have to agree as well.
"""

from __future__ import annotations

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
#: pairs of hashes that are compared at once
AT_ONCE = 1 << 17

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


def distance(first: int, second: int) -> int:
    """The bits of 64 in which two hashes differ."""
    return (first ^ second).bit_count()


def alike(hashes: Sequence[int | None], colours: Sequence[bytes], most: int = ALIKE) -> list[list[int]]:
    """Groups of pictures, by their numbers, which look alike; groups and their members in order.

    Two look alike if their hashes differ in `most` bits or fewer and their colours agree. A group holds what is joined
    so, directly or over others.
    """
    known = np.array([i for i, value in enumerate(hashes) if value is not None], dtype=np.int64)
    values = np.array([value for value in hashes if value is not None], dtype=np.uint64)
    tints = _normal(colours)
    group = np.arange(len(hashes))  # of each picture, named by its first member
    for row, column in _close(values, most, lambda places: bool((np.diff(group[known[places]]) == 0).all())):
        row, column = known[row], known[column]
        apart = group[row] != group[column]
        row, column = row[apart], column[apart]
        same = (tints[row] * tints[column]).sum(axis=1) >= SAME_COLOURS
        for i, j in zip(row[same], column[same], strict=True):
            if group[i] != group[j]:
                group[group == max(group[i], group[j])] = min(group[i], group[j])
    found: dict[int, list[int]] = {}
    for i in np.flatnonzero(np.bincount(group, minlength=len(group))[group] > 1).tolist():
        found.setdefault(int(group[i]), []).append(i)
    return list(found.values())


def _normal(colours: Sequence[bytes]) -> np.ndarray:
    """(N, 48), each row without its mean and of length 1: a product of two rows is their correlation."""
    rows = np.frombuffer(b"".join(colours), np.uint8).reshape(len(colours), GRID * GRID * 3).astype(np.float32)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _close(values: np.ndarray, most: int, joined: Callable[[np.ndarray], bool]
           ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of pairs of values, (N,) uint64, that differ in at most `most` bits, some at a time, some repeatedly.

    Of two values that agree in 64 - `most` bits, at least one of `most` + 1 bands of bits is equal: only what shares
    a band is compared. Places of which `joined` says that they are in one group already are left out: thousands of
    copies make a square of pairs otherwise.
    """
    edges = np.linspace(0, 64, most + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(band[order])) + 1, len(order))
        for start, end in zip(np.append(0, ends[:-1]), ends, strict=True):
            shared = order[start:end]
            rows = max(1, AT_ONCE // max(len(shared), 1))
            for first in range(0, len(shared) - 1, rows):
                if joined(shared[first:]):
                    break
                bits = values[shared[first:first + rows], None] ^ values[shared[first:]]
                row, column = np.divmod(np.flatnonzero(np.bitwise_count(bits) <= most), bits.shape[1])
                later = column > row
                if later.any():
                    yield shared[first + row[later]], shared[first + column[later]]
