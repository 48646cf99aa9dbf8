import math

import numpy as np
import pytest

from common.measure.surface_distance import border, hd95_mm

SPACING = (2.0, 1.0, 0.5)


def box(corner: tuple[int, int, int], size: int = 6, shape: tuple[int, int, int] = (24, 24, 24)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(c, c + size) for c in corner)] = True
    return mask


@pytest.mark.parametrize(("axis", "spacing"), [(0, 2.0), (1, 1.0), (2, 0.5)])
def test_a_shifted_cube_is_its_shift_away_in_millimetres(axis, spacing):
    corner = [4, 4, 4]
    corner[axis] += 3
    assert hd95_mm(box((4, 4, 4)), box(tuple(corner)), SPACING) == pytest.approx(3 * spacing)


def test_it_is_symmetric_and_zero_for_the_same_mask():
    a, b = box((2, 3, 4)), box((9, 8, 7), size=9)
    assert hd95_mm(a, b, SPACING) == hd95_mm(b, a, SPACING) > 0
    assert hd95_mm(a, a, SPACING) == 0


def test_a_few_far_voxels_are_left_out_and_a_tenth_is_not():
    a = box((2, 2, 2), size=10)
    few, many = a.copy(), a.copy()
    few[20, 20, 20] = True  # 1 of 489 border voxels
    many[20:23, 18:23, 18:23] = True
    assert hd95_mm(few, a, (1.0, 1.0, 1.0)) == 0
    assert hd95_mm(many, a, (1.0, 1.0, 1.0)) > 10


def test_nothing_found_costs_the_diagonal_of_the_grid_and_nothing_there_costs_nothing():
    empty, some = np.zeros((4, 6, 8), dtype=bool), box((1, 1, 1), size=2, shape=(4, 6, 8))
    diagonal = math.sqrt(8.0**2 + 6.0**2 + 4.0**2)
    assert hd95_mm(empty, some, SPACING) == hd95_mm(some, empty, SPACING) == pytest.approx(diagonal)
    assert hd95_mm(empty, empty, SPACING) == 0


def test_a_mask_that_fills_the_grid_has_its_border_on_the_grids_edge():
    full = np.ones((5, 5, 5), dtype=bool)
    assert border(full).sum() == 5**3 - 3**3
    assert hd95_mm(full, full, SPACING) == 0


def test_masks_of_another_grid_and_impossible_spacings_are_refused():
    with pytest.raises(ValueError, match="both alike"):
        hd95_mm(box((1, 1, 1)), box((1, 1, 1), shape=(24, 24, 25)), SPACING)
    with pytest.raises(ValueError, match="positive"):
        hd95_mm(box((1, 1, 1)), box((1, 1, 1)), (1.0, 0.0, 1.0))
