"""Closed planar contours to a mask on a voxel grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SAME_PLANE = 0.02  # slices; contours of one plane are written with rounded coordinates
_OWN_SLICE = 0.1  # slices; as far may a plane lie from the middle of the slice that it was drawn on
_FARTHEST = 2.0  # slices between planes of one structure; drawn more sparsely, it is not all there


@dataclass(frozen=True, kw_only=True, eq=False)
class Contour:
    """A closed polygon parallel to the slices. points: (n, 2), voxel indices i, j; height: voxel index k."""

    points: NDArray[np.float64]
    height: float


def inside_polygon(points: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(I, J), whether a voxel's centre lies inside: a ray from it crosses the outline an odd number of times.
    [Shimrat 1962, Algorithm 112]

    points: (n, 2), a closed polygon in voxel indices, the last point joined to the first. What it encloses twice, as
    a hole reached through a channel without width, is outside.
    """
    i, j = (np.arange(n, dtype=np.float64) for n in shape)
    inside = np.zeros(shape, dtype=bool)
    for (i0, j0), (i1, j1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        rows = np.flatnonzero((j0 <= j) != (j1 <= j))  # half open, so that a corner on a row counts once
        crossing = i0 + (j[rows] - j0) * (i1 - i0) / (j1 - j0) if len(rows) else np.empty(0)
        inside[:, rows] ^= i[:, None] < crossing
    return inside


def contour_mask(contours: Sequence[Contour], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """(I, J, K) uint8: voxels of one structure. A contour inside another of its plane is a hole (even-odd).

    Contours on the image's own slices fill these and no other. Those drawn on another scan have planes between the
    slices: there a slice takes the nearest plane, if that is no farther than half the distance of the planes, and at
    least half a slice. A slice that nobody drew on stays empty. What lies beyond the grid is left out.
    """
    planes: list[tuple[float, NDArray[np.bool_]]] = []
    for contour in sorted(contours, key=lambda one: one.height):
        filled = inside_polygon(contour.points, shape[:2])
        if planes and contour.height - planes[-1][0] <= _SAME_PLANE:
            planes[-1] = (planes[-1][0], planes[-1][1] ^ filled)
        else:
            planes.append((contour.height, filled))
    mask = np.zeros(shape, dtype=np.uint8)
    if not planes:
        return mask
    heights = np.array([height for height, _ in planes])
    if np.abs(heights - heights.round()).max() <= _OWN_SLICE:
        reach = 0.5
    else:
        # The smallest distance: a larger one is a gap that was drawn, between two tumours for instance.
        reach = min(max(float(np.diff(heights, prepend=-np.inf).min()), 1.0), _FARTHEST) / 2 + _SAME_PLANE
    for k in range(shape[2]):
        nearest = int(np.abs(heights - k).argmin())
        if abs(heights[nearest] - k) <= reach:
            mask[:, :, k] = planes[nearest][1]
    return mask
