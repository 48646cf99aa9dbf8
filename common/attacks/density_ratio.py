"""Density ratio: are there more synthetic volumes around this scan than there ought to be?

The ratio of two kernel density estimates, of the synthetic volumes and of a public or consented reference set, at the
scan. It tells a generator that is too dense around a patient from a patient who is merely typical.
[van Breugel et al. 2023, DOMIAS]
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.attacks.features import DIMENSIONS, Embedding, views
from common.attacks.templates import pool
from common.errors import DataError


class DensityRatio:
    """Raw score of one scan: log density of synthetic volumes minus log density of reference volumes.

    Both densities are sums over every shift and mirror image of the scan, so that a moved copy counts. Components,
    their scale and the kernel's width come from the synthetic volumes alone.

    synthetic (M, 1+K, 16, 16, 16), reference (R, 1+K, 16, 16, 16): pooled pairs; the reference is public or consented
    and holds nobody who is scored. Raises DataError for fewer of either than dimensions.
    """

    def __init__(self, synthetic: Tensor, reference: Tensor, *, dimensions: int = DIMENSIONS) -> None:
        require_reference(reference, dimensions)
        self._embedding = Embedding.fit(synthetic, dimensions)
        self._synthetic, self._reference = self._embedding(synthetic), self._embedding(reference)
        self._width = scott_width(len(synthetic), dimensions)

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pair (1+K, D, H, W), as if `own_copy` of the same shape were a synthetic volume too."""
        queries = self._embedding(views(scan))  # (250, d)
        synthetic = self._synthetic
        if own_copy is not None:
            synthetic = torch.cat([synthetic, self._embedding(pool(own_copy[None]))])
        return float(log_density(queries, synthetic, self._width) - log_density(queries, self._reference, self._width))


def require_reference(reference: Tensor, dimensions: int) -> None:
    """Raise DataError for fewer reference volumes than dimensions, or for values that are not finite."""
    if len(reference) < dimensions or not reference.isfinite().all():
        raise DataError(
            f"the reference set has {len(reference)} volumes, {dimensions} finite ones are the least; nothing was "
            "scored. Give a larger reference set, or leave out the attacks that need one."
        )


def scott_width(count: int, dimensions: int) -> float:
    """Kernel deviation for `count` whitened points.  [Scott 1992]"""
    return float(count ** (-1 / (dimensions + 4)))


def log_density(queries: Tensor, centres: Tensor, width: float) -> Tensor:
    """Log of the mean Gaussian kernel between queries (Q, d) and centres (M, d), up to a constant of d and width."""
    squared = queries.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1) - 2 * queries @ centres.T
    exponents = -squared.clamp(min=0) / (2 * width**2)
    return exponents.flatten().logsumexp(dim=0) - torch.tensor(float(exponents.numel())).log()
