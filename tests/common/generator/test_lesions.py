"""The public law of lesion shapes: what every draw keeps, and that no draw is somebody's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.generator.lesions import FORM_SIZE, lesion_occupancy
from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.settings.study import IntensitySettings, PhantomKind
from common.volume.volume import Grid
from tests.mask_copies import nearest_dice

PET = Grid(shape=(32, 32, 32), spacing_mm=(5.5, 5.5, 5.5))
GRIDS = [
    PET,
    Grid(shape=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0)),
    Grid(shape=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.3)),
    Grid(shape=(64, 64, 32), spacing_mm=(4.0, 4.0, 5.0)),
    Grid(shape=(24, 32, 16), spacing_mm=(5.0, 5.0, 5.0)),
]


def forms(count: int, *, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn((count, FORM_SIZE), generator=torch.Generator().manual_seed(seed))


def masks(count: int, *, seed: int) -> NDArray[np.bool_]:
    """Label maps as a release holds them."""
    return (lesion_occupancy(forms(count, seed=seed), PET)[:, 0] > 0.5).numpy()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid.shape)))
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_a_lesion_is_never_empty_and_never_touches_the_border(grid: Grid, scale: float) -> None:
    """Also for latents that no normal draw would give: an attacker may search there."""
    occupancy = lesion_occupancy(forms(60, scale=scale), grid)
    assert occupancy.shape == (60, 1, *grid.shape)
    assert occupancy.min() >= 0
    assert occupancy.max() <= 1
    assert ((occupancy > 0.5).sum(dim=(1, 2, 3, 4)) >= 20).all()
    occupancy[:, :, 1:-1, 1:-1, 1:-1] = 0
    assert occupancy.max() == 0


def test_sizes_run_from_small_to_large() -> None:
    share = lesion_occupancy(forms(300), PET).mean(dim=(1, 2, 3, 4))
    small, middle, large = torch.quantile(share, torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert small < 0.008
    assert 0.03 < middle < 0.07
    assert large > 0.1


def test_every_number_of_a_form_moves_its_lesion_smoothly() -> None:
    form = forms(8).requires_grad_()
    lesion_occupancy(form, PET).square().sum().backward()  # type: ignore[no-untyped-call]
    assert form.grad is not None
    assert form.grad.isfinite().all()
    assert (form.grad.abs().sum(dim=0) > 0).all()


def test_two_hundred_masks_hold_no_private_one_any_more_than_any_other() -> None:
    """Private patients are as far from the sample as fresh draws of the law, which nobody ever saw, are from it."""
    sample = masks(200, seed=1)
    window = IntensitySettings(kind="window", low=0.0, high=15.0)
    patients = draw_pairs(PhantomKind.LESIONS, 7, 60, site_scanner(7, 2), PET, window, {1: "lesion"})[:, 1] > 0.5
    fresh = nearest_dice(sample, masks(60, seed=2))
    found = nearest_dice(sample, patients)
    assert found.max() <= fresh.max()
    assert np.median(found) <= np.median(fresh) + 0.03


def test_the_search_finds_a_planted_mask_even_moved_and_mirrored() -> None:
    private = masks(3, seed=3)
    sample = masks(50, seed=1)
    assert nearest_dice(sample, private).max() < 0.9
    sample[17] = np.roll(private[1, ::-1], (1, 0, -1), axis=(0, 1, 2))
    assert nearest_dice(sample, private)[1] == 1.0
