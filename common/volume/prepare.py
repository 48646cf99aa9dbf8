"""From a scan in its own geometry and unit to a pair on the study's grid, and back.

Nothing here looks at more than one scan: a value taken from a cohort (its mean, its range) would be a
query to private data that no ledger saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, assert_never

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.errors import DataError
from common.settings.study import IntensitySettings
from common.volume.volume import Grid, Volume

_Number = TypeVar("_Number", bound=np.generic)
_ALIGNED = 1e-4  # relative difference of two affines that resampling would not change visibly


def prepare(
    image: Volume, label: Volume, *, labels: Mapping[int, str], grid: Grid, intensity: IntensitySettings
) -> NDArray[np.float32]:
    """One pair on the study's grid: (1+K, D, H, W) float32, axes RAS+, image channel in [-1, 1].

    The grid is laid around the centre of the scan's field of view, whatever the scan shows there. The image
    is interpolated linearly, after smoothing where the grid is coarser than the scan; each of the K labels,
    in ascending order, becomes the share of the voxel that it occupies, in [0, 1] with sums <= 1. Outside the
    scan the image takes its darkest value and no label.

    Raises DataError when image and label do not share a geometry or the image has no contrast to scale.
    """
    if not image.same_geometry(label):
        raise DataError("image and label lie on different voxel grids; the pair was not prepared")
    resampling = _resampling(image, grid)
    pair = np.zeros((1 + len(labels), *grid.shape), dtype=np.float32)
    values = resampling.apply(image.voxels.astype(np.float32, copy=False))
    pair[0] = _scale(values, resampling.inside, intensity)
    for channel, value in enumerate(sorted(labels), start=1):
        occupied = (label.voxels == value).astype(np.float32)
        pair[channel] = np.where(resampling.inside, resampling.apply(occupied), 0.0).clip(0.0, 1.0)
    # Smoothing and interpolation keep sums at one up to rounding; rounding must not make a negative background.
    pair[1:] /= np.maximum(pair[1:].sum(axis=0), 1.0)
    return pair


def restore(pair: NDArray[np.floating], *, labels: Mapping[int, str], grid: Grid) -> tuple[Volume, Volume]:
    """Image (float32 in [-1, 1]) and label map (uint8) of one pair, on the grid's own affine.

    A voxel takes the label, or the background, that occupies most of it; ties go to the background.
    Raises ValueError for a pair of another shape or a label that uint8 cannot hold.
    """
    if pair.shape != (1 + len(labels), *grid.shape):
        raise ValueError(f"a pair of this study has shape {(1 + len(labels), *grid.shape)}, got {pair.shape}")
    values = np.array([0, *sorted(labels)])
    if len(values) > 1 and not 1 <= values[1] <= values[-1] <= 255:
        raise ValueError(f"labels must lie in 1..255, got {sorted(labels)}")
    occupancy = pair[1:].astype(np.float32)
    shares = np.concatenate([1.0 - occupancy.sum(axis=0, keepdims=True), occupancy])
    label = values.astype(np.uint8)[shares.argmax(axis=0)]
    image = pair[0].astype(np.float32).clip(-1.0, 1.0)
    return Volume(voxels=image, affine=grid.affine), Volume(voxels=label, affine=grid.affine)


def to_ras(volume: Volume) -> Volume:
    """The same voxels with axes permuted and flipped so that i, j, k run nearest to right, anterior, superior."""
    order, flips = _nearest_axes(volume.affine)
    voxels = _turn(volume.voxels, order, flips)
    affine = volume.affine[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(voxels=voxels, affine=affine)


def orientation(volume: Volume) -> str:
    """The direction in which each voxel axis runs, as three of the letters R L A P S I."""
    order, flips = _nearest_axes(volume.affine)
    letters = [""] * 3
    for world, (axis, flip) in enumerate(zip(order, flips, strict=True)):
        letters[axis] = ("RAS", "LPI")[flip][world]
    return "".join(letters)


@dataclass(frozen=True, kw_only=True)
class _Resampling:
    """How one scan's voxels reach the grid; the same for its image and all its labels.

    matrix, offset: grid index -> index in the cropped RAS voxels. identity: both grids are one, nothing is
    interpolated. inside: grid voxels whose centre lies in the scan's field of view.
    """

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    crop: tuple[slice, slice, slice]
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    identity: bool
    inside: NDArray[np.bool_]

    def apply(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        """(D, H, W) values on the grid; beyond the scan's edge its last voxel is repeated."""
        voxels = _turn(voxels, self.order, self.flips)[self.crop]
        if self.identity:
            return voxels
        steps = np.linalg.norm(self.matrix, axis=1)  # scan voxels from one grid voxel to the next
        # A Gaussian of (step - 1) / 2 voxels removes what the coarser grid cannot show.
        sigma = np.maximum(steps - 1.0, 0.0) / 2.0
        if sigma.any():
            voxels = ndimage.gaussian_filter(voxels, sigma, mode="nearest", truncate=3.0)
        diagonal = np.diagonal(self.matrix)
        separable = np.allclose(self.matrix, np.diag(diagonal), rtol=0.0, atol=_ALIGNED)
        out: NDArray[np.float32] = ndimage.affine_transform(
            voxels,
            diagonal if separable else self.matrix,  # scipy's fast path is a vector of steps
            self.offset,
            output_shape=self.inside.shape,
            order=1,
            mode="nearest",
            output=np.float32,
        )
        return out


def _resampling(scan: Volume, grid: Grid) -> _Resampling:
    """The mapping from grid voxels to scan voxels that lays the centre of one on the centre of the other."""
    order, flips = _nearest_axes(scan.affine)
    directions = scan.affine[:3, order] * np.where(flips, -1.0, 1.0)
    shape = np.array(scan.shape)[list(order)]
    matrix = np.linalg.solve(directions, np.diag(grid.spacing_mm)).astype(np.float64)
    offset = (shape - 1) / 2 - matrix @ ((np.array(grid.shape) - 1) / 2)
    index = [_along(matrix[axis], offset[axis], grid.shape) for axis in range(3)]
    inside = np.ones(grid.shape, dtype=bool)
    for axis in range(3):
        inside &= (index[axis] >= -0.5 - _ALIGNED) & (index[axis] <= shape[axis] - 0.5 + _ALIGNED)
    # Only the voxels that the grid reaches are smoothed and read: a whole CT would cost gigabytes.
    reach = 2 + np.ceil(1.5 * np.maximum(np.linalg.norm(matrix, axis=1) - 1.0, 0.0)).astype(int)
    first = [max(0, int(np.floor(i.min())) - int(r)) for i, r in zip(index, reach, strict=True)]
    last = [min(int(n), int(np.ceil(i.max())) + int(r) + 1) for i, r, n in zip(index, reach, shape, strict=True)]
    identity = tuple(shape) == grid.shape and np.allclose(matrix, np.eye(3), rtol=0.0, atol=_ALIGNED)
    return _Resampling(
        order=order,
        flips=flips,
        crop=(slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2])),
        matrix=matrix,
        offset=offset - np.array(first),
        identity=identity,
        inside=inside,
    )


def _along(row: NDArray[np.float64], offset: float, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """(D, H, W) scan index along one axis of every grid voxel."""
    i, j, k = (np.arange(n, dtype=np.float64) for n in shape)
    index: NDArray[np.float64] = offset + row[0] * i[:, None, None] + row[1] * j[None, :, None] + row[2] * k
    return index


def _turn(voxels: NDArray[_Number], order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> NDArray[_Number]:
    """A view with axes in this order, those marked reversed."""
    x, y, z = (slice(None, None, -1 if flip else 1) for flip in flips)
    return voxels.transpose(order)[x, y, z]


def _nearest_axes(affine: NDArray[np.float64]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Voxel axis nearest to each of x, y, z, and whether it runs against it; each axis is used once."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(_ORDERS, key=lambda order: sum(abs(cosines[world, axis]) for world, axis in enumerate(order)))
    x, y, z = (bool(cosines[world, axis] < 0) for world, axis in enumerate(best))
    return best, (x, y, z)


_ORDERS: tuple[tuple[int, int, int], ...] = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def _scale(values: NDArray[np.float32], inside: NDArray[np.bool_], intensity: IntensitySettings) -> NDArray[np.float32]:
    """Grey values to [-1, 1] by the study's window, or by percentiles of this scan's voxels on the grid."""
    seen = values[inside]
    if not seen.size:  # a scan thinner than a grid voxel may slip between two centres
        raise DataError(_FLAT)
    match intensity.kind:
        case "window":
            low, high = intensity.low, intensity.high
        case "robust":
            low, high = (float(p) for p in np.percentile(seen, [intensity.low, intensity.high]))
        case _:
            assert_never(intensity.kind)
    if high <= low:
        raise DataError(_FLAT)
    scaled = ((np.where(inside, values, seen.min()) - low) * (2.0 / (high - low)) - 1.0).clip(-1.0, 1.0)
    if np.ptp(scaled[inside]) == 0:
        raise DataError(_FLAT)
    return scaled.astype(np.float32)


_FLAT = "the image has no contrast on the study's grid; the pair was not prepared"
