"""How a scan's voxels reach the study's grid: linear interpolation, after smoothing where the grid is coarser.

A scan whose axes run along the grid's, as nearly all do, is resampled by one small matrix per axis; any other
by scipy's general transform. Both give the same values up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.volume.volume import Grid, Volume

Shape = tuple[int, int, int]
Vector = tuple[float, float, float]
_Number = TypeVar("_Number", bound=np.generic)
_ALIGNED = 1e-4  # difference of two grids, in voxels, that resampling would not change visibly
_NOT_AT_ALL: Vector = (0.0, 0.0, 0.0)
_TRUNCATE = 3.0  # standard deviations after which the smoothing Gaussian is cut


@dataclass(frozen=True, kw_only=True, eq=False)
class _Axis:
    """What one axis of an aligned scan contributes.

    first, last: the crop, as a slice. weights: (grid voxels, cropped scan voxels) float32, read-only; None when
    both are one and nothing is interpolated. inside: (grid voxels,) bool, read-only.
    """

    first: int
    last: int
    weights: NDArray[np.float32] | None
    inside: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Aligned:
    """Resampling of a scan whose voxel axes run along the grid's: linear, and separable into its axes.

    inside: (D, H, W), grid voxels whose centre lies in the scan's field of view.
    """

    axes: tuple[_Axis, _Axis, _Axis]
    inside: NDArray[np.bool_]

    def crop(self, voxels: NDArray[_Number]) -> NDArray[_Number]:
        """A view of the scan's voxels that the grid reaches."""
        i, j, k = (slice(axis.first, axis.last) for axis in self.axes)
        return voxels[i, j, k]

    def apply(self, cropped: NDArray[np.float32]) -> NDArray[np.float32]:
        """(D, H, W) values on the grid; beyond the scan's edge its last voxel is repeated.

        cropped: what `crop` gave; finite, since every voxel is multiplied into its whole row.
        """
        x, y, z = (axis.weights for axis in self.axes)
        out = np.ascontiguousarray(cropped)  # matmul leaves BLAS for the strides of a turned or Fortran-ordered view
        if z is not None:
            out = out @ z.T
        if y is not None:
            out = y @ out
        if x is not None:
            out = (x @ out.reshape(len(out), -1)).reshape(-1, *out.shape[1:])
        return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Oblique:
    """Resampling of a scan that lies at any angle to the grid.

    matrix, offset: grid index -> index in the cropped voxels. bounds: first and one past the last voxel of the
    crop, per axis. inside: as in `Aligned`.
    """

    bounds: tuple[tuple[int, int], ...]
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    inside: NDArray[np.bool_]

    def crop(self, voxels: NDArray[_Number]) -> NDArray[_Number]:
        """A view of the scan's voxels that the grid reaches."""
        i, j, k = (slice(first, last) for first, last in self.bounds)
        return voxels[i, j, k]

    def apply(self, cropped: NDArray[np.float32]) -> NDArray[np.float32]:
        """(D, H, W) values on the grid; beyond the scan's edge its last voxel is repeated.

        cropped: what `crop` gave.
        """
        sigma = [_sigma(step) for step in np.linalg.norm(self.matrix, axis=1)]
        if any(sigma):
            cropped = ndimage.gaussian_filter(cropped, sigma, mode="nearest", radius=[_radius(s) for s in sigma])
        out: NDArray[np.float32] = ndimage.affine_transform(
            cropped,
            self.matrix,
            self.offset,
            output_shape=self.inside.shape,
            order=1,
            mode="nearest",
            output=np.float32,
        )
        return out


def resampling(scan: Volume, grid: Grid, shift_mm: Vector = _NOT_AT_ALL) -> Aligned | Oblique:
    """The way that lays the centre of the grid on the centre of the scan's field of view, or `shift_mm` from it.

    scan: voxel axes nearest to R, A, S, as `to_ras` gives them. shift_mm: along R, A, S.
    """
    matrix = np.linalg.solve(scan.affine[:3, :3], np.diag(grid.spacing_mm)).astype(np.float64)
    steps = np.diagonal(matrix)
    if np.abs(matrix - np.diag(steps)).max() <= _ALIGNED:
        x, y, z = (float(step) for step in steps)
        a, b, c = (float(s * step / mm) for s, step, mm in zip(shift_mm, steps, grid.spacing_mm, strict=True))
        return aligned(scan.shape, (x, y, z), grid.shape, (a, b, c))
    return oblique(scan.shape, matrix, grid.shape, matrix @ np.divide(shift_mm, grid.spacing_mm))


def aligned(scan: Shape, steps: Vector, grid: Shape, shift: Vector = _NOT_AT_ALL) -> Aligned:
    """steps: scan voxels from one grid voxel to the next, per axis, positive. shift: of the centre, in scan voxels."""
    x, y, z = (_axis(*axis) for axis in zip(scan, steps, grid, shift, strict=True))
    inside = x.inside[:, None, None] & y.inside[:, None] & z.inside
    return Aligned(axes=(x, y, z), inside=inside)


def oblique(
    scan: Shape, matrix: NDArray[np.float64], grid: Shape, shift: NDArray[np.float64] | Vector = _NOT_AT_ALL
) -> Oblique:
    """matrix: (3, 3), grid index -> scan index, but for the offset. Right for an aligned scan too, only slower."""
    offset = (np.array(scan) - 1) / 2 + np.array(shift) - matrix @ ((np.array(grid) - 1) / 2)
    i, j, k = (np.arange(n, dtype=np.float64) for n in grid)
    inside = np.ones(grid, dtype=bool)
    bounds = []
    for n, row, start in zip(scan, matrix, offset, strict=True):
        index = start + row[0] * i[:, None, None] + row[1] * j[:, None] + row[2] * k
        inside &= _in_view(index, n)
        bounds.append(_reach(index, n, float(np.linalg.norm(row))))
    first = np.array([bound[0] for bound in bounds])
    return Oblique(bounds=tuple(bounds), matrix=matrix, offset=offset - first, inside=inside)


@lru_cache(maxsize=128)  # a cohort has a few dozen extents per axis; an entry is some kilobytes
def _axis(n: int, step: float, m: int, shift: float) -> _Axis:
    """From n scan voxels to m grid voxels, `step` scan voxels apart, centre on centre, or `shift` scan voxels beside.

    A row holds the two weights of linear interpolation, spread by the Gaussian that scipy would smooth with.
    """
    if n == m and abs(step - 1.0) <= _ALIGNED and shift == 0.0:
        return _Axis(first=0, last=n, weights=None, inside=_frozen(np.ones(m, dtype=bool)))
    index = (n - 1) / 2 + shift + step * (np.arange(m, dtype=np.float64) - (m - 1) / 2)
    first, last = _reach(index, n, step)
    within = index.clip(0, n - 1)[:, None] - np.arange(first, last)
    weights = (1.0 - np.abs(within)).clip(min=0.0)
    if sigma := _sigma(step):
        # Filtering unit impulses gives the filter's matrix, repetition of the edge voxel included.
        impulses = np.eye(last - first)
        weights = weights @ ndimage.gaussian_filter1d(impulses, sigma, axis=0, mode="nearest", radius=_radius(sigma))
    inside = _in_view(index, n)
    return _Axis(first=first, last=last, weights=_frozen(weights.astype(np.float32)), inside=_frozen(inside))


def _frozen(shared: NDArray[_Number]) -> NDArray[_Number]:
    """The same array, read-only: it is handed to every scan of this extent."""
    shared.setflags(write=False)
    return shared


def _sigma(step: float) -> float:
    """A Gaussian of (step - 1) / 2 voxels removes what the coarser grid cannot show."""
    return max(step - 1.0, 0.0) / 2.0


def _radius(sigma: float) -> int:
    """Voxels after which the Gaussian is cut, as scipy counts them, but the same for steps that differ by rounding."""
    return int(_TRUNCATE * sigma + 0.5 + _ALIGNED)


def _in_view(index: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    """Whether a scan index lies on one of n voxels, whose edges are half a voxel from their centres."""
    seen: NDArray[np.bool_] = (index >= -0.5 - _ALIGNED) & (index <= n - 0.5 + _ALIGNED)
    return seen


def _reach(index: NDArray[np.float64], n: int, step: float) -> tuple[int, int]:
    """Slice of the n scan voxels that are read for these indices: a whole CT, smoothed, would cost gigabytes."""
    margin = 2 + int(np.ceil(_TRUNCATE * _sigma(step)))
    return max(0, int(np.floor(index.min())) - margin), min(n, int(np.ceil(index.max())) + margin + 1)
