"""Pictures made worse: a little, so that they still show what they showed; or so much that they show nothing proper.

A reader has to read a generated picture although it is soft or off in colour, and to refuse a half-formed one. All
works on batches, uint8 (N, 3, side, side), and is a function of a seed; lengths are shares of the side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

#: blur of mild damage: as much as scaling 128 pixels down to 64 and up again
MILD_BLUR = 0.012


def _uniform(rng: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=rng)


def _bytes(pictures: Tensor) -> Tensor:
    return pictures.add_(0.5).clamp_(0, 255).to(torch.uint8)


def mild(pictures: Tensor, seed: int) -> Tensor:
    """Softer or sharper, noisier, shifted in colour, or bent and moved a little: what was said of them stays true."""
    rng = torch.Generator().manual_seed(seed)
    count, _, side, _ = pictures.shape
    found = pictures.float()
    bent = (_uniform(rng, 0, 1, count) < 0.5).nonzero().flatten()
    if len(bent):
        found[bent] = _bent(found[bent], rng, 0.008, 8, shift=0.03)
    soft = _blurred(found, _uniform(rng, 0.4, 1, count) * MILD_BLUR * side)
    amount = _uniform(rng, -0.6, 1, count, 1, 1, 1)
    found.lerp_(soft, amount.mul_(_uniform(rng, 0, 1, count, 1, 1, 1) < 0.75))
    found.mul_(_uniform(rng, 0.95, 1.05, count, 3, 1, 1)).add_(_uniform(rng, -8, 8, count, 3, 1, 1))
    for cells, most in ((side, 6), (max(side // 6, 1), 5)):
        noise = torch.randn(count, 3, cells, cells, generator=rng) * _uniform(rng, 0, most, count, 1, 1, 1)
        found += noise if cells == side else F.interpolate(noise, (side, side), mode="bilinear")
    return _bytes(found)


def strong(pictures: Tensor, seed: int) -> Tensor:
    """Each broken in one of several ways: blurred, mixed, erased in part, melted, shuffled, torn, or blotched."""
    rng = torch.Generator().manual_seed(seed)
    ways = torch.randint(len(WAYS), (len(pictures),), generator=rng)
    found = pictures.float()
    others = pictures.roll(1, 0).float()
    for number, way in enumerate(WAYS.values()):
        rows = (ways == number).nonzero().flatten()
        if len(rows):
            found[rows] = way(found[rows], others[rows], rng)
    return _bytes(found)


def broken(pictures: Tensor, way: str, seed: int) -> Tensor:
    """All broken in one of the `WAYS`."""
    rng = torch.Generator().manual_seed(seed)
    return _bytes(WAYS[way](pictures.float(), pictures.roll(1, 0).float(), rng))


# --- ways to break pictures: (pictures, others, random numbers) -> pictures, floats in 0 … 255 --------------------


def _blur(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Far out of focus."""
    return _blurred(pictures, _uniform(rng, 0.06, 0.12, len(pictures)) * pictures.shape[-1])


def _mix(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Two pictures, each seen through the other."""
    return pictures.lerp(others, _uniform(rng, 0.35, 0.65, len(pictures), 1, 1, 1))


def _erase(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Patches of background over parts of the object, hard or soft at the edge: a quarter to three quarters of it."""
    side = pictures.shape[-1]
    line = (torch.arange(side) + 0.5) / side
    found = pictures.clone()
    for picture, object_ in zip(found, foreground(pictures), strict=True):
        places = object_.nonzero()
        if not len(places):
            continue
        gone = torch.zeros(side, side)
        for _ in range(12):
            y, x = (places[int(torch.randint(len(places), (), generator=rng))] + 0.5) / side
            a, b, edge = _uniform(rng, 0.06, 0.16, 3)
            spread = torch.maximum(((line[:, None] - y) / b).abs(), ((line - x) / a).abs()) if edge < 0.1 else (
                ((line[:, None] - y) / b) ** 2 + ((line - x) / a) ** 2).sqrt()
            patch = ((1.15 - spread) / 0.3).clamp(0, 1)
            if torch.maximum(gone, patch)[object_].mean() < 0.75:
                gone = torch.maximum(gone, patch)
            if gone[object_].mean() > 0.3:
                break
        picture.lerp_(_background(picture[None])[0], gone)
    return found


def _melt(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Bent out of shape."""
    return _bent(pictures, rng, 0.13, 6)


def _smear(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Dragged along a line, fading."""
    count, _, side, _ = pictures.shape
    turn = _uniform(rng, 0, 6.28, count)
    way = torch.stack([turn.cos(), turn.sin()], -1) * _uniform(rng, 0.5, 0.8, count, 1)
    found, weight = torch.zeros_like(pictures), 0.0
    for step in range(9):
        share = 0.85 ** step
        found += share * F.grid_sample(pictures, _grid(side) + (way * step / 8)[:, None, None], mode="bilinear",
                                       padding_mode="border", align_corners=False)
        weight += share
    return found / weight


def _shuffle(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Cut into 4 x 4 tiles that change places."""
    count, channels, side, _ = pictures.shape
    tile = side // 4
    tiles = pictures.unfold(2, tile, tile).unfold(3, tile, tile).reshape(count, channels, 16, tile, tile)
    tiles = torch.stack([one[:, torch.randperm(16, generator=rng)] for one in tiles])
    rows = tiles.view(count, channels, 4, 4, tile, tile).transpose(3, 4)
    return F.interpolate(rows.reshape(count, channels, 4 * tile, 4 * tile), (side, side))


def _tear(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Cut into strips that slip to either side by turns."""
    count, _, side, _ = pictures.shape
    found = pictures.clone()
    for i in range(count):
        strips, upright = int(torch.randint(3, 7, (), generator=rng)), bool(torch.rand((), generator=rng) < 0.5)
        picture = found[i].transpose(1, 2) if upright else found[i]
        pieces = []
        for number, piece in enumerate(picture.tensor_split(strips, 1)):
            slip = round(float(_uniform(rng, 0.1, 0.22)) * side) * (1 if number % 2 else -1)
            kept = piece.roll(slip, 2)
            ends = slice(0, slip) if slip > 0 else slice(side + slip, side)
            kept[:, :, ends] = piece[:, :, :1] if slip > 0 else piece[:, :, -1:]
            pieces.append(kept)
        torn = torch.cat(pieces, 1)
        found[i] = torn.transpose(1, 2) if upright else torn
    return found


def _blotch(pictures: Tensor, others: Tensor, rng: Generator) -> Tensor:
    """Under blotches of noise in any colours, coarse or fine."""
    count, _, side, _ = pictures.shape
    cells = int(torch.randint(5, 20, (), generator=rng))
    noise = F.interpolate(_uniform(rng, 0, 255, count, 3, cells, cells), (side, side), mode="bicubic")
    where = F.interpolate(_uniform(rng, -0.4, 1.4, count, 1, 6, 6), (side, side), mode="bilinear").clamp(0, 1)
    return pictures.lerp(noise, 0.35 + 0.5 * where)


Way = Callable[[Tensor, Tensor, Generator], Tensor]
WAYS: dict[str, Way] = {"blur": _blur, "mix": _mix, "erase": _erase, "melt": _melt, "smear": _smear,
                        "shuffle": _shuffle, "tear": _tear, "blotch": _blotch}


# --- tools -------------------------------------------------------------------------------------------------------


def foreground(pictures: Tensor) -> Tensor:
    """What stands out from the background, bool (N, side, side)."""
    return (pictures.float() - _background(pictures.float())).abs().amax(1) > 45


def _background(pictures: Tensor) -> Tensor:
    """The background behind the object: colours between those of the four corners, floats (N, 3, side, side)."""
    side = pictures.shape[-1]
    wide = max(side // 16, 1)
    ends = [slice(0, wide), slice(side - wide, side)]
    corners = torch.stack([torch.stack([pictures[:, :, y, x].mean((2, 3)) for x in ends], -1) for y in ends], -2)
    return F.interpolate(corners, (side, side), mode="bilinear", align_corners=True)


def _blurred(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Each picture blurred by its own sigma, in pixels."""
    count, channels, side, _ = pictures.shape
    reach = min(max(round(2.5 * float(sigma.max())), 1), side - 1)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) / sigma[:, None]) ** 2 / 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None]
    found = pictures.reshape(1, count * channels, side, side)
    found = F.conv2d(F.pad(found, (reach, reach, 0, 0), mode="replicate"), kernel, groups=count * channels)
    found = F.conv2d(F.pad(found, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3),
                     groups=count * channels)
    return found.view_as(pictures)


def _grid(side: int) -> Tensor:
    """Where each pixel is, (1, side, side, 2), in [-1, 1]."""
    return F.affine_grid(torch.eye(2, 3)[None], [1, 1, side, side], align_corners=False)


def _bent(pictures: Tensor, rng: Generator, by: float, cells: int, shift: float = 0.0) -> Tensor:
    """Moved by up to `shift`, and by a wavy field of `by`, its standard deviation at its `cells` x `cells` knots."""
    count, _, side, _ = pictures.shape
    field = torch.randn(count, 2, cells, cells, generator=rng) * 2 * by
    field = F.interpolate(field, (side, side), mode="bicubic").permute(0, 2, 3, 1)
    field += _uniform(rng, -2 * shift, 2 * shift, count, 1, 1, 2)
    return F.grid_sample(pictures, _grid(side) + field, mode="bilinear", padding_mode="border", align_corners=False)
