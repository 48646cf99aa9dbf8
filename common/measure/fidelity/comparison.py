"""Feature by feature and in their correlations: do synthetic scans measure as real ones do?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp, rankdata

Floats = NDArray[np.float64]

_FEWEST = 3  # values on either side that a test needs


@dataclass(frozen=True, kw_only=True)
class FeatureTest:
    """Two-sample test of one feature. None where a side has too few values.

    distance: Kolmogorov-Smirnov, in [0, 1]. p_adjusted: for having tested all features.
    """

    feature: str
    distance: float | None
    p: float | None
    p_adjusted: float | None


@dataclass(frozen=True, kw_only=True)
class FeatureComparison:
    """Tests of every feature, and how differently they are correlated.

    correlation_difference: None where no two features vary on both sides. left_out_real, left_out_synthetic: scans
    without any value, such as those with an empty label.
    """

    tests: tuple[FeatureTest, ...]
    correlation_difference: float | None
    left_out_real: int
    left_out_synthetic: int

    def differ(self, level: float = 0.05) -> tuple[str, ...]:
        """Features whose distributions differ, with at most `level` chance of a single false one among them."""
        return tuple(t.feature for t in self.tests if t.p_adjusted is not None and t.p_adjusted <= level)


def compare_features(real: Floats, synthetic: Floats, names: Sequence[str]) -> FeatureComparison:
    """Rows (N, F), (M, F) of the named features, NaN where a scan has no value.

    "No difference found" in few scans says little: the distances stand beside the p values.
    Raises ValueError when a side does not have one column for each name.
    """
    if real.shape[1:] != (len(names),) or synthetic.shape[1:] != (len(names),):
        raise ValueError(f"{len(names)} features are named, got shapes {real.shape} and {synthetic.shape}")
    found = [_test(a[~np.isnan(a)], b[~np.isnan(b)]) for a, b in zip(real.T, synthetic.T, strict=True)]
    tested = [p for _, p in found if p is not None]
    adjusted = iter(holm(tested))
    return FeatureComparison(
        tests=tuple(
            FeatureTest(feature=name, distance=distance, p=p, p_adjusted=None if p is None else next(adjusted))
            for name, (distance, p) in zip(names, found, strict=True)
        ),
        correlation_difference=correlation_difference(real, synthetic),
        left_out_real=int(np.isnan(real).all(axis=1).sum()),
        left_out_synthetic=int(np.isnan(synthetic).all(axis=1).sum()),
    )


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values: rejecting those up to alpha errs anywhere with probability at most alpha.  [Holm 1979]"""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(p) - rank) * p[i], 1.0))
        adjusted[i] = largest
    return adjusted


def correlation_difference(real: Floats, synthetic: Floats) -> float | None:
    """Mean absolute difference of the two sets' rank correlations [Spearman 1904] over pairs of features, in [0, 2].

    Rows with a NaN are left out; so is a pair of which one feature is constant in either set. None where no pair
    is left. Two samples of n scans of one distribution differ by about 1.2 / sqrt(n) for lack of numbers alone.
    """
    a, b = (_rank_correlations(rows[~np.isnan(rows).any(axis=1)]) for rows in (real, synthetic))
    apart = np.abs(a - b)[np.triu_indices(len(a), 1)]
    apart = apart[~np.isnan(apart)]
    return float(apart.mean()) if len(apart) else None


def _rank_correlations(rows: Floats) -> Floats:
    """(n, F) -> (F, F), NaN where a feature is constant or there are fewer than three rows."""
    features = rows.shape[1]
    if len(rows) < _FEWEST:
        return np.full((features, features), math.nan)
    ranks = rankdata(rows, axis=0)
    ranks = ranks - ranks.mean(axis=0)
    length = np.sqrt(np.square(ranks).sum(axis=0))
    length = np.where(length > 0, length, math.nan)
    return np.asarray((ranks / length).T @ (ranks / length))


def _test(a: Floats, b: Floats) -> tuple[float | None, float | None]:
    """Kolmogorov-Smirnov distance and p value.  [Smirnov 1939]"""
    if min(len(a), len(b)) < _FEWEST:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where p is too small to be counted out it is approximated
        result = ks_2samp(a, b)
    return float(result.statistic), float(result.pvalue)
