"""Damage: a function of its seed; mild damage changes little, strong damage much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from impasto.evaluation import damage
from impasto.evaluation.reader import pixels_of
from impasto.mini import world

WORKS = {"mild": damage.mild, "strong": damage.strong}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return pixels_of([world.draw(world.scene(seed, pairs=0.3), 64, seed) for seed in range(16)])


def change(found: Tensor, pictures: Tensor) -> Tensor:
    """The mean change of each picture's values."""
    return (found.float() - pictures.float()).abs().mean((1, 2, 3))


@pytest.mark.parametrize("name", WORKS)
def test_damage_is_a_function_of_its_seed(name: str, pictures: Tensor) -> None:
    kept = pictures.clone()
    found = WORKS[name](pictures, 3)
    assert found.dtype == torch.uint8 and found.shape == pictures.shape
    assert torch.equal(found, WORKS[name](pictures, 3))
    assert not torch.equal(found, WORKS[name](pictures, 4))
    assert torch.equal(pictures, kept)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_any_size_is_damaged(side: int) -> None:
    whole = pixels_of([world.draw(world.scene(1), 64, 1)]).repeat(3, 1, 1, 1)
    larger = torch.nn.functional.interpolate(whole.float(), (side, side)).to(torch.uint8)
    assert damage.mild(larger, 0).shape == damage.strong(larger, 0).shape == larger.shape


def test_mild_damage_leaves_the_objects_where_they_are(pictures: Tensor) -> None:
    found = damage.mild(pictures, 5)
    assert float(change(found, pictures).max()) < 16
    before, after = damage.foreground(pictures), damage.foreground(found)
    same = (before == after).float().mean((1, 2))
    assert float(same.min()) > 0.9


@pytest.mark.parametrize("way", damage.WAYS)
def test_each_way_to_break_a_picture_shows(way: str, pictures: Tensor) -> None:
    found = damage.broken(pictures, way, 5)
    assert found.shape == pictures.shape and found.dtype == torch.uint8
    assert float(change(found, pictures).min()) > 1  # also of a small object of which a part is gone
    assert float(change(found, pictures).mean()) > 3.5


def test_the_erased_part_is_a_quarter_of_the_object_or_more(pictures: Tensor) -> None:
    before = damage.foreground(pictures)
    after = damage.foreground(damage.broken(pictures, "erase", 7))
    left = (before & after).sum((1, 2)) / before.sum((1, 2))
    assert float(left.max()) < 0.8 and float(left.min()) > 0.1


def test_the_foreground_is_the_object() -> None:
    ground = world.finish(world.ground("blue", 64, world.numbers("test")), "filled")
    assert not damage.foreground(pixels_of([ground])).any()
    star = world.Scene((world.Object("square", "red", size="large"),), "blue")
    share = damage.foreground(pixels_of([world.draw(star, 64, 1)])).float().mean()
    assert float(share) == pytest.approx(0.84 ** 2 * world.SIZES["large"] ** 2, rel=0.15)
