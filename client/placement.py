"""Where the study's grid is laid on a scan whose labelled structure may lie anywhere in it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.volume.volume import Grid, Volume


def shift_to_hold(label: Volume, grid: Grid) -> NDArray[np.float64]:
    """How far the grid's centre must leave the centre of the scan to hold every labelled voxel: (3,) mm, RAS+.

    Per axis: zero where nothing would be cut off, else as little as leaves one voxel of the grid around the
    structure; one that is longer than the grid has the grid on its middle. label: at least one voxel is not 0.
    """
    occupied = np.argwhere(label.voxels)
    low, high = occupied.min(axis=0) - 0.5, occupied.max(axis=0) + 0.5
    centre = (np.array(label.shape) - 1) / 2
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), axis=-1).reshape(-1, 3)
    corners_mm = (corners - centre) @ label.affine[:3, :3].T
    low_mm, high_mm = corners_mm.min(axis=0), corners_mm.max(axis=0)
    spacing = np.array(grid.spacing_mm)
    half = spacing * np.array(grid.shape) / 2
    cut = (low_mm < -half) | (high_mm > half)
    # A grid that lies anywhere from `least` to `most` holds the structure and the voxel around it.
    least, most = high_mm + spacing - half, low_mm - spacing + half
    shift = np.where(least <= most, np.clip(0.0, least, np.maximum(least, most)), (low_mm + high_mm) / 2)
    return np.where(cut, shift, 0.0)
