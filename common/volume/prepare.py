"""From a scan in its own geometry and unit to a pair on the study's grid, and back.

Nothing here looks at more than one scan: a value taken from a cohort (its mean, its range) would be a
query to private data that no ledger saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, assert_never

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.settings.study import IntensitySettings
from common.volume.resampling import Vector, resampling
from common.volume.volume import Grid, Volume

_Number = TypeVar("_Number", bound=np.generic)


def prepare(
    image: Volume,
    label: Volume,
    *,
    labels: Mapping[int, str],
    grid: Grid,
    intensity: IntensitySettings,
    shift_mm: Vector = (0.0, 0.0, 0.0),
) -> NDArray[np.float32]:
    """One pair on the study's grid: (1+K, D, H, W) float32, axes RAS+, image channel in [-1, 1].

    The grid is laid around the centre of the scan's field of view, whatever the scan shows there, or `shift_mm`
    (along R, A, S) from it. The image is interpolated linearly, after smoothing where the grid is coarser than the
    scan; each of the K labels, in ascending order, becomes the share of the voxel that it occupies, in [0, 1] with
    sums <= 1. Outside the scan the image takes its darkest value and no label. The image must be finite.

    Raises DataError when image and label do not share a geometry or the image has no contrast to scale.
    """
    if not image.same_geometry(label):
        raise DataError("image and label lie on different voxel grids; the pair was not prepared")
    # The image's affine turns both: near 45 degrees the label's own, rounded otherwise, may choose other axes.
    image, mask = to_ras(image), to_ras(Volume(voxels=label.voxels, affine=image.affine)).voxels
    way = resampling(image, grid, shift_mm)
    pair = np.empty((1 + len(labels), *grid.shape), dtype=np.float32)
    pair[0] = _scale(way.apply(way.crop(image.voxels).astype(np.float32, copy=False)), way.inside, intensity)
    mask = way.crop(mask)
    for channel, value in enumerate(sorted(labels), start=1):
        pair[channel] = way.apply((mask == value).astype(np.float32))
    pair[1:].clip(0.0, 1.0, out=pair[1:])
    pair[1:] *= way.inside
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
