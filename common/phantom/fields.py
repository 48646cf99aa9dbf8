"""Smooth random fields and separable smoothing on voxel grids: the texture of every phantom.

Both are products of one small matrix per axis, which is many times faster than resampling
voxel by voxel, and exact at any grid size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]


def smooth_fields(
    rng: np.random.Generator, count: int, shape: Shape, spacing_mm: tuple[float, float, float], knot_mm: float
) -> NDArray[np.float32]:
    """Independent Gaussian random fields, mean 0 and variance 1 at every voxel.

    Uniform cubic B-splines on knots `knot_mm` apart with standard normal coefficients: details are
    about 1.5 * knot_mm wide. Returns (count, I, J, K) float32.
    """
    rows = [_spline_rows(n, max(1, round(n * spacing / knot_mm))) for n, spacing in zip(shape, spacing_mm, strict=True)]
    coefficients = rng.standard_normal((count, *(row.shape[1] for row in rows)), dtype=np.float32)
    return _along_axes(coefficients, rows)


def smooth_curve(rng: np.random.Generator, points: int, bends: int) -> NDArray[np.float32]:
    """(points,) float32: a Gaussian random function with mean 0, variance 1 and about `bends` bends."""
    row = _spline_rows(points, bends)
    curve: NDArray[np.float32] = row @ rng.standard_normal(row.shape[1], dtype=np.float32)
    return curve


def blur(volume: NDArray[np.float32], sigma_voxels: tuple[float, float, float]) -> NDArray[np.float32]:
    """(I, J, K) smoothed by a Gaussian; at the border the kernel is cut and renormalised. Sigma 0 copies."""
    rows = [_gaussian_rows(n, sigma) for n, sigma in zip(volume.shape, sigma_voxels, strict=True)]
    blurred: NDArray[np.float32] = _along_axes(volume[None], rows)[0]
    return blurred


def _along_axes(volumes: NDArray[np.float32], rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Apply an (n_out, n_in) matrix along each of the last three axes of (C, I, J, K)."""
    volumes = rows[1] @ (volumes @ rows[2].T)
    count, i, j, k = volumes.shape
    out: NDArray[np.float32] = (rows[0] @ volumes.reshape(count, i, j * k)).reshape(count, -1, j, k)
    return out


@lru_cache(maxsize=256)
def _spline_rows(points: int, intervals: int) -> NDArray[np.float32]:
    """(points, intervals + 3) cubic B-spline weights, each row of length 1 so that variance is 1 everywhere."""
    at = np.linspace(0.0, intervals, points)[:, None]
    distance = np.abs(at - np.arange(-1, intervals + 2)[None, :])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    rows: NDArray[np.float32] = (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
    rows.setflags(write=False)
    return rows


def _gaussian_rows(points: int, sigma: float) -> NDArray[np.float32]:
    """(points, points) rows of a normalised Gaussian with `sigma` in voxels."""
    offsets = np.subtract.outer(np.arange(points), np.arange(points))
    if sigma <= 0:
        return np.eye(points, dtype=np.float32)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    rows: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return rows
