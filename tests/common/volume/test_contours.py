"""Contours to voxels: the rule at corners and holes, and planes that are not the image's own."""

import numpy as np
import pytest

from common.volume.contours import Contour, contour_mask, inside_polygon


def square(low: float, high: float, k: float = 0.0) -> Contour:
    return Contour(points=np.array([(low, low), (high, low), (high, high), (low, high)], dtype=float), height=k)


def test_centres_inside_are_counted_whichever_way_the_outline_runs() -> None:
    points = square(1.5, 4.5).points
    assert inside_polygon(points, (8, 8)).sum() == 9
    np.testing.assert_array_equal(inside_polygon(points[::-1], (8, 8)), inside_polygon(points, (8, 8)))


def test_a_corner_at_the_height_of_a_centre_is_crossed_once() -> None:
    diamond = np.array([(4.0, 1.0), (7.0, 4.0), (4.0, 7.0), (1.0, 4.0)])
    filled = inside_polygon(diamond, (9, 9))
    i, j = np.indices((9, 9))
    distance = abs(i - 4) + abs(j - 4)
    assert filled[distance < 3].all()
    assert not filled[distance > 3].any()


def test_a_circle_has_its_area() -> None:
    turn = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    filled = inside_polygon(np.stack([50 + 30.3 * np.cos(turn), 50 + 30.3 * np.sin(turn)], axis=1), (100, 100))
    assert filled.sum() == pytest.approx(np.pi * 30.3**2, rel=0.01)


def test_a_contour_in_another_is_a_hole_and_one_beside_it_is_not() -> None:
    ring = contour_mask([square(-0.5, 9.5), square(2.5, 5.5), square(11.5, 13.5)], (16, 16, 1))
    assert ring.sum() == 100 - 9 + 4
    assert ring[4, 4, 0] == 0


def test_a_slice_between_two_structures_stays_empty() -> None:
    mask = contour_mask([square(1, 5, 1), square(1, 5, 6.03)], (8, 8, 8))
    assert np.flatnonzero(mask.any(axis=(0, 1))).tolist() == [1, 6]


@pytest.mark.parametrize("step", [0.4, 1.5])
def test_planes_of_another_scan_fill_every_slice_and_never_cancel(step: float) -> None:
    planes = [square(0.5, 4.5, 1 + step * n) for n in range(int(6 / step))]
    mask = contour_mask(planes, (8, 8, 10))
    assert (mask[:, :, 2:6].sum(axis=(0, 1)) == 16).all()


def test_what_lies_beyond_the_grid_is_left_out() -> None:
    assert contour_mask([square(5.5, 20, 0), square(1, 4, 30)], (8, 8, 2)).sum() == 4
