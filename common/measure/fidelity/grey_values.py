"""Whether grey values occur as often, and coarse and fine structure is as strong, as in real scans."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BINS = 256  # over [-1, 1]; a distance is exact to one bin, 0.008
_LEAST_POWER = 1e-9  # of a shell, in squared grey values per voxel: below it a scan is flat but for rounding


def intensity_distances(real: NDArray[np.floating], synthetic: NDArray[np.floating]) -> tuple[float | None, ...]:
    """1-Wasserstein distance of grey values by tissue, background first, for pairs (N, 1+K, D, H, W).

    In grey values, at most 2: how far grey value must be moved to turn one histogram into the other  [Rubner et al.
    2000]. Each voxel counts by the share that the tissue has of it. None for a tissue that a whole set lacks.
    """
    return tuple(
        wasserstein(p, q) if p.sum() > 0 and q.sum() > 0 else None
        for p, q in zip(tissue_histograms(real), tissue_histograms(synthetic), strict=True)
    )


def tissue_histograms(pairs: NDArray[np.floating]) -> Floats:
    """(N, 1+K, D, H, W) -> (1+K, BINS): voxels of background and of each label at each grey value, over all scans."""
    found = np.zeros((pairs.shape[1], BINS))
    for pair in pairs:
        bins = ((pair[0].astype(np.float64).ravel().clip(-1.0, 1.0) + 1.0) * (BINS / 2)).astype(np.int64)
        bins = np.minimum(bins, BINS - 1)
        occupancy = pair[1:].astype(np.float64).reshape(len(pair) - 1, -1)
        shares = [(1.0 - occupancy.sum(axis=0)).clip(min=0.0), *occupancy]
        found += np.stack([np.bincount(bins, weights, BINS) for weights in shares])
    return found


def wasserstein(p: Floats, q: Floats) -> float:
    """Area between the distribution functions of two histograms (BINS,) over [-1, 1].  [Vallender 1974]"""
    return float(np.abs(np.cumsum(p / p.sum() - q / q.sum())).sum() * 2.0 / BINS)


def spectrum_distance_db(
    real: NDArray[np.floating], synthetic: NDArray[np.floating], spacing_mm: tuple[float, float, float]
) -> float:
    """Mean absolute difference of two sets' mean logarithmic radial power spectra, in decibel.

    real, synthetic: images (N, D, H, W). A generator that upsamples badly lacks or invents fine structure
    [Durall et al. 2020, section 3.1, there in 2-D].
    """
    a, b = (10.0 * np.log10(radial_spectrum(x, spacing_mm)).mean(axis=0) for x in (real, synthetic))
    return float(np.abs(a - b).mean())


def radial_spectrum(images: NDArray[np.floating], spacing_mm: tuple[float, float, float]) -> Floats:
    """(N, D, H, W) -> (N, S): mean power of each shell of spatial frequencies, in squared grey values per voxel.

    S is half the shortest axis; shells are equally wide in cycles per millimetre, from just above zero to the lowest
    of the axes' Nyquist frequencies, beyond which directions would be missing. The scan's mean is taken off first.
    """
    shape = images.shape[1:]
    axes = [np.fft.fftfreq(n, s) for n, s in zip(shape, spacing_mm, strict=True)]
    length = np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij")))
    nyquist = min(0.5 / s for s in spacing_mm)
    shells = max(min(shape) // 2, 1)
    shell = np.ceil(length / nyquist * shells - 1e-9).astype(np.int64).ravel()  # 0: the mean
    inside = (shell >= 1) & (shell <= shells)
    count = np.bincount(shell[inside], minlength=shells + 1)[1:]
    found = np.empty((len(images), shells))
    for row, image in zip(found, images, strict=True):
        power = np.abs(np.fft.fftn(image - image.mean(dtype=np.float64), norm="ortho")).ravel() ** 2
        row[:] = np.bincount(shell[inside], power[inside], shells + 1)[1:] / np.maximum(count, 1)
    return found.clip(min=_LEAST_POWER)
