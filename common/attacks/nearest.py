"""Nearest-synthetic distance in coarse features of image and labels together.

Complements the near-copy score: it sees a generator that reproduces a patient's overall shape, contrast and label
anatomy, with or without the fine structure.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.attacks.templates import centre_windows, pool, variants

_FLAT = 1e-3  # grey-value deviation under which a window is blank and is not blown up


class Nearest:
    """Raw score of one scan: distance to the nearest reference volume minus distance to the nearest candidate.

    Features: windows pooled by two to 7 voxels an axis (the 8-voxel grid without its rim), the image at mean 0 and
    deviation 1 within the window, then each feature z-scored by mean and deviation over the PUBLIC volumes. A scale
    fitted on patients would let one patient move all scores.

    candidates (M, 1+K, 16, 16, 16), reference (R, 1+K, 16, 16, 16): pooled pairs. Without a reference the score is
    minus the distance to the nearest candidate.
    """

    def __init__(self, candidates: Tensor, reference: Tensor | None) -> None:
        public = candidates if reference is None else torch.cat([candidates, reference])
        features = _pooled(centre_windows(public))  # (M + R, F)
        deviation = features.std(dim=0, correction=0)
        # A voxel that is almost constant in synthetic volumes would otherwise drown all others in real scans.
        floor = 0.25 * deviation.square().mean().sqrt()
        self._mean = features.mean(dim=0)
        self._scale = deviation.clamp(min=float(floor) + 1e-6)
        z = self._scaled(features)
        self._candidates = z[: len(candidates)].T.contiguous()
        self._candidate_norms = self._candidates.square().sum(dim=0)  # (M,)
        self._reference = z[len(candidates) :].T.contiguous()  # no column without a reference
        self._reference_norms = self._reference.square().sum(dim=0)

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pair (1+K, D, H, W), as if `own_copy` of the same shape were a candidate too."""
        queries = self._scaled(_pooled(variants(pool(scan[None])[0])))  # (54, F)
        nearest = _smallest(queries, self._candidates, self._candidate_norms)
        if own_copy is not None:
            copy = self._scaled(_pooled(centre_windows(pool(own_copy[None])))).T
            nearest = torch.minimum(nearest, _smallest(queries, copy, copy.square().sum(dim=0)))
        if not len(self._reference_norms):
            return float(-nearest)
        return float(_smallest(queries, self._reference, self._reference_norms) - nearest)

    def usual(self, scan: Tensor) -> float:
        """Minus the median over candidates of the distance to each: how near to any of them a scan of this kind is."""
        queries = self._scaled(_pooled(variants(pool(scan[None])[0])))  # (54, F)
        squared = _squared_distances(queries, self._candidates, self._candidate_norms).amin(dim=0).median()
        return -float((squared.clamp(min=0) / queries.shape[1]).sqrt())

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._scale


def _pooled(windows: Tensor) -> Tensor:
    """(N, C, 14, 14, 14) -> (N, C * 343), image standardised within its window, occupancies as they are."""
    coarse = F.avg_pool3d(windows, 2)
    image = coarse[:, :1] - coarse[:, :1].mean(dim=(2, 3, 4), keepdim=True)
    deviation = image.square().mean(dim=(2, 3, 4), keepdim=True).sqrt()
    return torch.cat([image / deviation.clamp(min=_FLAT), coarse[:, 1:]], dim=1).flatten(1)


def _smallest(queries: Tensor, templates: Tensor, template_norms: Tensor) -> Tensor:
    """Smallest root-mean-square distance between any query (Q, F) and any template (F, M)."""
    squared = _squared_distances(queries, templates, template_norms)
    return (squared.min().clamp(min=0) / queries.shape[1]).sqrt()


def _squared_distances(queries: Tensor, templates: Tensor, template_norms: Tensor) -> Tensor:
    """(Q, M) sums of squares; rounding may carry one below zero."""
    return queries.square().sum(dim=1, keepdim=True) + template_norms - 2 * (queries @ templates)
