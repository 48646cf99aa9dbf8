"""How far apart the borders of two segmentations lie."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]


def hd95_mm(found: Mask, truth: Mask, spacing_mm: Spacing) -> float:
    """95th percentile of the Hausdorff distance, in millimetres.  [Huttenlocher et al. 1993; Taha and Hanbury 2015]

    found, truth: (D, H, W). The larger of the two 95th percentiles of the distance from each border voxel of one mask
    to the nearest border voxel of the other, between centres. Both empty: 0. One empty: the diagonal of the grid, the
    longest distance there is, so that a segmenter gains nothing by finding nothing.
    Raises ValueError for different shapes or a spacing that is not positive.
    """
    if found.shape != truth.shape or found.ndim != 3:
        raise ValueError(f"masks are (D, H, W), both alike, got {found.shape} and {truth.shape}")
    if min(spacing_mm) <= 0:
        raise ValueError(f"spacing must be positive, got {spacing_mm} mm")
    if not found.any() and not truth.any():
        return 0.0
    if not found.any() or not truth.any():
        return math.hypot(*(n * s for n, s in zip(found.shape, spacing_mm, strict=True)))
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(found | truth))
    a, b = border(found[box]), border(truth[box])
    return max(float(np.percentile(d, 95)) for d in (_distances(a, b, spacing_mm), _distances(b, a, spacing_mm)))


def border(mask: Mask) -> Mask:
    """Voxels of the mask with a face on something else; what lies beyond the array is something else."""
    return np.asarray(mask & ~binary_erosion(mask), dtype=np.bool_)


def _distances(a: Mask, b: Mask, spacing_mm: Spacing) -> NDArray[np.float64]:
    """From each voxel of a to the nearest of b."""
    return np.asarray(distance_transform_edt(~b, sampling=spacing_mm)[a], dtype=np.float64)
