"""Muon against its definition: singular vectors by SVD in float64, AdamW for vectors against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from impasto.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(6, 6), (3, 40), (40, 3)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonal(matrix) @ vh.T  # diagonal, if the directions are the matrix's own
    assert torch.diagonal(inside).min() > 0.6 and torch.diagonal(inside).max() < 1.25
    assert (inside - torch.diag(torch.diagonal(inside))).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(5, 30), (7, 8), (6, 6)])
def test_the_rounds_are_those_of_the_paper(shape: tuple[int, int]) -> None:
    a, b, c = 3.4445, -4.7750, 2.0315  # as Jordan et al. write them down
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonal(matrix), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(orthogonal(matrix.float()).double(), x, rtol=1e-3, atol=1e-4)


def test_vectors_go_as_in_adamw() -> None:
    start = torch.linspace(-1, 1, 7)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([{"params": [ours], "lr": 0.01}], betas=(0.9, 0.99), weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(20):
        for parameter in (ours, theirs):
            parameter.grad = torch.sin(torch.arange(7.0) * (step + 1))
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_a_matrix_is_its_gradient_made_orthogonal() -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False)
    before = layer.weight.detach().clone()
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    layer.weight.grad = gradient.clone()
    Muon([{"params": [layer.weight], "lr": 0.5}], weight_decay=0.0).step()
    u, _, vh = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    moved = (before - layer.weight.detach()).flatten(1).double() / (0.5 * 0.2 * 36**0.5)
    inside = torch.diagonal(u.T @ moved @ vh.T)
    assert inside.min() > 0.6 and inside.max() < 1.25


def test_it_fits_a_linear_map() -> None:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 16, generator=rng)
    target = inputs @ torch.randn(16, 16, generator=rng)
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = Muon([{"params": [weight], "lr": 0.1}], weight_decay=0.0)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 150)
        loss = (inputs @ weight - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1e-3 * target.square().mean().item()
