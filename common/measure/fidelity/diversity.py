"""How alike the scans of one set are: multi-scale structural similarity among pairs of them."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common.measure.fidelity.content_order import content_order
from common.measure.intervals import Interval

# Wang et al. 2003, section 3.2: exponent of each scale, finest first.
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_RANGE = 2.0  # grey values lie in [-1, 1]
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
_RADIUS, _SIGMA = 2, 1.0  # voxels; the photographs' 11 and 1.5 would leave one scale of a grid of 24
_PARTNERS = 4  # of each scan on either side
FEWEST_ALIKE = 3  # scans of a set: with two there is one pair, and no spread
_BATCH = 16  # pairs at once: bounds memory, changes no result


def ms_ssim(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Structural similarity of images (N, D, H, W) in [-1, 1], pair by pair, over scales: (N,) in [0, 1].

    prod_j cs_j^w_j times l^w at the coarsest scale  [Wang et al. 2003, Eq. 7], cs (contrast and structure) and l
    (luminance) averaged over the volume. In 3-D with a Gaussian window of 5 voxels, deviation 1, wholly inside; each
    scale halves the one before, as often as the shortest axis holds a window, five at most; the exponents of the
    scales that there are are divided by their sum. A negative mean cs counts as zero.
    Raises ValueError for different shapes and for an axis shorter than the window.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images are (N, D, H, W), both alike, got {a.shape} and {b.shape}")
    scales = _scales(a.shape[1:])
    weights = np.array(EXPONENTS[:scales]) / sum(EXPONENTS[:scales])
    found = [
        _similarity(_tensor(a[i : i + _BATCH]), _tensor(b[i : i + _BATCH]), weights) for i in range(0, len(a), _BATCH)
    ]
    return np.concatenate(found) if found else np.zeros(0)


def mean_similarity(images: NDArray[np.floating], confidence: float = 0.95) -> Interval:
    """Mean MS-SSIM among pairs of one set (N, D, H, W): high where a generator repeats itself.  [Odena et al. 2017]

    Each scan meets eight others, or all where there are fewer. The interval is the delete-one jackknife's over
    scans, not over pairs, because a scan is in many; its variance errs upwards [Efron and Stein 1981].
    Raises ValueError for fewer than FEWEST_ALIKE scans.
    """
    n = len(images)
    if n < FEWEST_ALIKE:
        raise ValueError(f"similarity among pairs needs at least {FEWEST_ALIKE} scans, got {n}")
    ordered = images[content_order(images)]
    first, second = _partners(n)
    values = ms_ssim(ordered[first], ordered[second])
    of_scan = np.bincount(first, values, n) + np.bincount(second, values, n)
    pairs_of_scan = np.bincount(first, minlength=n) + np.bincount(second, minlength=n)
    estimate = float(values.mean())
    without = (values.sum() - of_scan) / (len(values) - pairs_of_scan)
    variance = (n - 1) / n * float(np.square(without - without.mean()).sum())
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return Interval(low=estimate - half, estimate=estimate, high=estimate + half, confidence=confidence)


def difference(a: Interval, b: Interval) -> Interval:
    """A - b of independent estimates with symmetric normal intervals of one confidence: half-widths add as squares.

    Raises ValueError for different confidences.
    """
    if a.confidence != b.confidence:
        raise ValueError(f"intervals have different confidences: {a.confidence} and {b.confidence}")
    d, half = a.estimate - b.estimate, math.hypot(a.high - a.estimate, b.high - b.estimate)
    return Interval(low=d - half, estimate=d, high=d + half, confidence=a.confidence)


def _partners(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs on a ring: each scan with the next _PARTNERS, each pair once."""
    steps = range(1, min(_PARTNERS, n // 2) + 1)
    pairs = {(min(i, (i + s) % n), max(i, (i + s) % n)) for s in steps for i in range(n)}
    first, second = np.array(sorted(pairs), dtype=np.int64).T
    return first, second


def _scales(shape: tuple[int, ...]) -> int:
    window, shortest = 2 * _RADIUS + 1, min(shape)
    if shortest < window:
        raise ValueError(f"MS-SSIM needs {window} voxels along each axis, got {shape}")
    return min(len(EXPONENTS), 1 + int(math.log2(shortest / window)))


def _tensor(images: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.asarray(images, dtype=np.float64))[:, None]


def _similarity(a: Tensor, b: Tensor, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, 1, D, H, W) float64 -> (B,)."""
    product = torch.ones(len(a), dtype=torch.float64)
    for scale, weight in enumerate(weights):
        mean_a, mean_b = _blur(a), _blur(b)
        var_a, var_b, cov = (
            _blur(x) - m for x, m in ((a * a, mean_a**2), (b * b, mean_b**2), (a * b, mean_a * mean_b))
        )
        cs = ((2 * cov + _C2) / (var_a + var_b + _C2)).mean(dim=(1, 2, 3, 4)).clamp(min=0.0)
        product = product * cs**weight
        if scale == len(weights) - 1:
            light = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
            product = product * light.mean(dim=(1, 2, 3, 4)).clamp(min=0.0) ** weight
        a, b = F.avg_pool3d(a, 2), F.avg_pool3d(b, 2)
    found: NDArray[np.float64] = product.numpy()
    return found


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean over each window that lies wholly inside, one axis after the other."""
    at = torch.arange(-_RADIUS, _RADIUS + 1, dtype=x.dtype)
    window = torch.exp(-(at**2) / (2 * _SIGMA**2))
    window = window / window.sum()
    for axis in (2, 3, 4):
        shape = [1] * 5
        shape[axis] = len(window)
        x = F.conv3d(x, window.reshape(shape))
    return x
