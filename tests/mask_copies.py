"""How nearly one set of masks holds another: the largest overlap over small shifts and a mirror image."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

SHIFTS = tuple(product((-1, 0, 1), repeat=3))


def nearest_dice(masks: NDArray[np.bool_], sought: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(M, D, H, W), (N, D, H, W) -> (N,): of each sought mask with the mask most like it, moved by up to a voxel."""
    rows = masks.reshape(len(masks), -1).astype(np.float32)
    sizes = rows.sum(axis=1)
    best = np.zeros(len(sought))
    for mirror, shift in product((1, -1), SHIFTS):
        moved = np.roll(sought[:, ::mirror], shift, axis=(1, 2, 3)).reshape(len(sought), -1).astype(np.float32)
        dice = 2 * moved @ rows.T / (moved.sum(axis=1)[:, None] + sizes[None])
        best = np.maximum(best, dice.max(axis=1))
    return best
