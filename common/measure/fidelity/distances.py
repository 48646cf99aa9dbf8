"""How far two sets of features lie apart: Frechet distance and kernel inception distance."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from common.measure.intervals import Interval

Floats = NDArray[np.float64]

FEWEST = 8  # rows of a set: fewer say nothing about a spread


def frechet_distance(reference: Floats, other: Floats) -> float:
    """Squared Frechet distance of two normal distributions fitted to feature rows (N, d), (M, d).  [Heusel et al. 2017]

    Covariances are shrunk, because sets are hardly larger than d. The distance of two samples of one distribution is
    still above zero and falls with their size: 64 standard normal features give 2.2 with 64 rows each, 0.5 with 256 and
    0.15 with 1,024. Compare sets of one size only, and read KID for whether anything differs at all.
    Raises ValueError for sets of fewer than FEWEST rows or of different features.
    """
    _check(reference, other)
    return gaussian_frechet(
        reference.mean(axis=0), shrunk_covariance(reference), other.mean(axis=0), shrunk_covariance(other)
    )


def gaussian_frechet(mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats) -> float:
    """|a - b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) for normals of means a, b (d,) and covariances A, B (d, d).

    [Dowson and Landau 1982]; rounding below zero is zero.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0.0)).sum()
    apart = float(np.square(mean_a - mean_b).sum())
    return max(apart + float(np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * common), 0.0)


def shrunk_covariance(rows: Floats) -> Floats:
    """(N, d) -> (d, d): sample covariance moved towards a multiple of the identity.  [Ledoit and Wolf 2004, Lemma 3.1]

    (b2 / d2) m I + (1 - b2 / d2) S, with m the mean eigenvalue, d2 = |S - m I|^2 and b2 the estimated error of S,
    at most d2; norms squared per dimension.
    """
    n, d = rows.shape
    centred = rows - rows.mean(axis=0)
    sample = centred.T @ centred / n
    target = float(np.trace(sample)) / d * np.eye(d)
    spread = float(np.square(sample - target).sum())
    lengths = np.square(centred).sum(axis=1)
    error = (float(np.square(lengths).sum()) / n - float(np.square(sample).sum())) / n  # of S, as a mean of x x^T
    share = min(error / spread, 1.0) if spread > 0 else 1.0
    return np.asarray(share * target + (1.0 - share) * sample)


def kernel_distance(reference: Floats, other: Floats, confidence: float = 0.95) -> Interval:
    """KID: unbiased squared MMD of rows (N, d), (M, d) under k(x, y) = (x.y / d + 1)^3.  [Binkowski et al. 2018]

    It is zero in the mean for equal distributions at any size, so it may be negative.
    Interval: normal, with the delete-one jackknife's variance over the rows of both sets. It errs upwards [Efron and
    Stein 1981], most where the sets are equal and the statistic degenerates: there it is about twice the true one,
    which makes up for a skewed distribution. Subsets or blocks would be wider by their own number's root.
    Raises ValueError for sets of fewer than FEWEST rows or of different features.
    """
    _check(reference, other)
    estimate = squared_mmd(reference, other)
    within, apart = _cubic(reference, reference), _cubic(reference, other)
    within_other = _cubic(other, other)
    variance = _jackknife_variance(within, apart) + _jackknife_variance(within_other, apart.T)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return Interval(low=estimate - half, estimate=estimate, high=estimate + half, confidence=confidence)


def squared_mmd(a: Floats, b: Floats) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy, cubic kernel.  [Gretton et al. 2012, Eq. 3]

    a (N, d), b (M, d), two rows at least.
    """
    within = sum((float(k.sum()) - float(np.trace(k))) / (len(k) * (len(k) - 1)) for k in (_cubic(a, a), _cubic(b, b)))
    return within - 2.0 * float(_cubic(a, b).mean())


def _jackknife_variance(within: Floats, apart: Floats) -> float:
    """Of squared_mmd over one set's rows, from kernels (n, n) within that set and (n, m) to the other.

    (n - 1) / n times the sum of squares of the values without each row about their mean.  [Tukey 1958]
    """
    n, m = apart.shape
    of_row = within.sum(axis=1) - np.diag(within)
    without = (of_row.sum() - 2.0 * of_row) / ((n - 1) * (n - 2)) - 2.0 * (apart.sum() - apart.sum(axis=1)) / (
        (n - 1) * m
    )
    return float((n - 1) / n * np.square(without - without.mean()).sum())


def _cubic(a: Floats, b: Floats) -> Floats:
    return np.asarray((a @ b.T / a.shape[1] + 1.0) ** 3)


def _check(reference: Floats, other: Floats) -> None:
    if reference.ndim != 2 or other.ndim != 2 or reference.shape[1] != other.shape[1]:
        raise ValueError(f"features are rows of one length, got shapes {reference.shape} and {other.shape}")
    if min(len(reference), len(other)) < FEWEST:
        raise ValueError(f"a set has at least {FEWEST} scans, got {len(reference)} and {len(other)}")
