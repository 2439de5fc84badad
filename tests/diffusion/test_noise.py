"""Noise for training: its statistics, and that each row is a function of its own key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from impasto.core.rng import Draws
from impasto.diffusion import noise

SHAPE = (4, 16, 24)


def all_of(draws: Draws) -> list[Tensor]:
    plain = noise.gaussian(draws, SHAPE)
    return [plain, noise.add_offset(plain, draws, 0.1), noise.add_pyramid(plain, draws, 0.3),
            noise.perturb(plain, draws, 0.1)]


def test_a_row_depends_on_its_own_sample_only() -> None:
    together, swapped = all_of(Draws(3, 7, [0, 1, 2])), all_of(Draws(3, 7, [2, 0]))
    for one, other in zip(together, swapped, strict=True):
        assert one.shape == (3, *SHAPE) and one.dtype == torch.float32
        assert torch.equal(one[[2, 0]], other)


def test_gaussian_is_standard_normal() -> None:
    plain = noise.gaussian(Draws(0, 0, range(64)), SHAPE)
    assert plain.mean().item() == pytest.approx(0, abs=0.01)
    assert plain.std().item() == pytest.approx(1, abs=0.01)


def test_offset_shifts_whole_channels() -> None:
    draws = Draws(0, 0, range(512))
    plain = noise.gaussian(draws, SHAPE)
    shift = noise.add_offset(plain, draws, 0.5) - plain
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert shift[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.05)
    # each channel by its own draw
    assert torch.corrcoef(shift[..., 0, 0].T).fill_diagonal_(0).abs().max() < 0.2


def test_perturbation_adds_independent_noise() -> None:
    draws = Draws(0, 0, range(64))
    plain = noise.gaussian(draws, SHAPE)
    extra = noise.perturb(plain, draws, 0.1) - plain
    assert extra.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs((extra * plain).mean().item()) < 0.002


def test_pyramid_has_unit_deviation_and_more_low_frequencies() -> None:
    draws = Draws(0, 0, range(64))
    plain = noise.gaussian(draws, SHAPE)
    pyramid = noise.add_pyramid(plain, draws, 0.6)
    torch.testing.assert_close(pyramid.std(dim=(1, 2, 3)), torch.ones(64))

    def coarse(x: Tensor) -> float:  # the deviation of means over 8 × 8 cells: 1/8 for white noise
        return torch.nn.functional.avg_pool2d(x, 8).std().item()

    assert coarse(plain) == pytest.approx(1 / 8, rel=0.05)
    assert coarse(pyramid) > 1.5 * coarse(plain)


def test_pyramid_is_the_sum_of_its_levels() -> None:
    draws = Draws(0, 0, [0])
    plain = noise.gaussian(draws, (1, 4, 2))
    expected = plain.double()
    for level, size in ((1, (2, 1)), (2, (1, 1))):  # ends at a single cell
        coarse = draws.normal(f"noise.pyramid.{level}", (1, *size)).double()
        # halfway-centred linear interpolation of 2 rows to 4, by hand
        rows = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]) if size[0] == 2 else torch.ones(4, 1)
        expected = expected + 0.5**level * (rows.double() @ coarse[0, 0]).expand(4, 2)
    torch.testing.assert_close(noise.add_pyramid(plain, draws, 0.5).double(), expected / expected.std())
