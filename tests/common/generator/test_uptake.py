"""Waves of uptake: numbers make fields, and images give their numbers back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.generator.lesions import FORM_SIZE, lesion_occupancy
from common.generator.uptake import UptakeCode, uptake_fields, warm_spots, wave_numbers
from common.volume.volume import Grid

GRID = Grid(shape=(24, 24, 16), spacing_mm=(4.0, 4.0, 6.0))
CODE = UptakeCode(lesion=8, around=12, spots=0)


def masks(count: int, seed: int = 0) -> Tensor:
    forms = torch.randn((count, FORM_SIZE), generator=torch.Generator().manual_seed(seed))
    return lesion_occupancy(forms, GRID)


def numbers(count: int) -> Tensor:
    return 0.1 * torch.randn((count, CODE.count), generator=torch.Generator().manual_seed(1))


def test_a_code_of_any_size_leaves_numbers_for_more_than_waves() -> None:
    for code_size in range(3, 400):
        code = UptakeCode.of(code_size)
        assert code.lesion >= 1
        assert code.count <= code_size - 2
    assert UptakeCode.of(399) == UptakeCode(lesion=64, around=63, spots=2)  # there are no more


def test_fields_lie_in_the_lesion_and_around_it() -> None:
    masks_ = masks(3)
    inside, around, _ = uptake_fields(numbers(3), masks_, CODE).unbind(dim=1)
    assert not inside[masks_[:, 0] == 0].any()
    assert not around[masks_[:, 0] == 1].any()
    assert inside[masks_[:, 0] == 1].std() > 0.05
    assert around[masks_[:, 0] == 0].std() > 0.05


def test_numbers_are_found_again_in_the_image_they_made() -> None:
    """Log uptake around the lesion and share of its mean inside; the ridge makes found numbers a little smaller."""
    wanted, masks_ = numbers(6), (masks(6) > 0.5).float()
    inside, around, _ = uptake_fields(wanted, masks_, CODE).unbind(dim=1)
    means = torch.stack([i[m > 0].mean() for i, m in zip(inside, masks_[:, 0], strict=True)])
    lesion = 0.4 * (1 + inside - means[:, None, None, None])
    images = torch.where(masks_[:, 0] > 0, lesion, 0.1 * around.exp() - 0.01)
    found = wave_numbers(images[:, None], masks_, CODE)
    for part in (found[:, : CODE.lesion], wanted[:, : CODE.lesion]), (found[:, 8:], wanted[:, 8:]):
        assert torch.corrcoef(torch.stack([p.flatten() for p in part]))[0, 1] > 0.9


def test_a_lesions_waves_move_with_it() -> None:
    ball = torch.zeros((1, 1, 24, 24, 16))
    ball[0, 0, 4:9, 4:9, 4:9] = 1
    moved = ball.roll((7, 3, 4), dims=(2, 3, 4))
    here, there = (uptake_fields(numbers(1), mask, CODE)[:, :1] for mask in (ball, moved))
    assert torch.allclose(here.roll((7, 3, 4), dims=(2, 3, 4)), there, atol=1e-5)


def test_the_first_wave_makes_the_middle_colder_than_the_rim() -> None:
    x, y, z = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), torch.arange(16.0), indexing="ij")
    ball = ((x - 9) ** 2 + (y - 9) ** 2 + (z - 8) ** 2 <= 36).float()[None, None]
    one = torch.eye(1, CODE.count)
    field = uptake_fields(one, ball, CODE)[0, 0]
    assert field[9, 9, 8] == pytest.approx(-1.0, abs=1e-5)
    assert field[3, 9, 8] > 0.9


@pytest.mark.parametrize("mask", [torch.zeros((1, 1, 24, 24, 16)), torch.ones((1, 1, 24, 24, 16))])
def test_no_lesion_and_nothing_else_give_numbers_too(mask: Tensor) -> None:
    found = wave_numbers(torch.full_like(mask, 0.2), mask, CODE)
    assert found.shape == (1, CODE.count)
    assert torch.isfinite(found).all()
    assert torch.isfinite(uptake_fields(numbers(1), mask, CODE)).all()


def test_a_search_can_follow_the_slope_of_numbers_and_masks() -> None:
    wanted, masks_ = numbers(2).requires_grad_(), masks(2).requires_grad_()
    uptake_fields(wanted, masks_, CODE).square().sum().backward()
    assert wanted.grad is not None
    assert masks_.grad is not None
    assert torch.isfinite(masks_.grad).all()
    assert (wanted.grad.abs().sum(dim=0) > 0).all()


def test_warm_spots_lie_where_their_numbers_say_but_never_in_the_lesion() -> None:
    masks_ = masks(1)
    spot = torch.tensor([[0.0, 0.0, 0.6745, 5.0, 1.5]])  # in the middle, and halfway to the last slice; large and hot
    spots = warm_spots(spot, torch.zeros_like(masks_))
    at = (spots[0, 0] > 0.3).nonzero().float().mean(dim=0)
    assert torch.allclose(at, torch.tensor([11.5, 11.5, 11.25]), atol=0.3)
    assert spots.max() == pytest.approx(torch.e**-1.0, abs=0.01)
    assert (spots > 0).float().mean() == pytest.approx(torch.pi / 6 * 0.46**3, rel=0.2)  # a ball, up to its faded edge
    assert not warm_spots(spot, torch.ones_like(masks_)).any()
    both = warm_spots(torch.cat([spot, -spot], dim=1), masks_)
    assert (both >= warm_spots(spot, masks_)).all()
    assert not warm_spots(torch.zeros((1, 0)), masks_).any()
