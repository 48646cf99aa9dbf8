"""Near-copy similarity: does a synthetic volume show this very patient's fine structure?

Band-pass normalised cross-correlation: anatomy that everybody shares is coarse and cancels, grey-value gain and
offset cancel, what is left is the individual pattern. Reads the image only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from client.scoring.templates import SIDE, centre_windows, variants

_SIGMA = 1.5  # of the removed low-pass, in pooled voxels
_EPSILON = 1e-6  # a structureless window correlates with nothing instead of dividing by zero


class NearCopy:
    """Raw score of one scan: best correlation with a candidate minus best correlation with a reference volume.

    Depends on the scan, the public volumes and constants only; no other patient is ever in reach.

    candidates, reference: (M, 1+K, 16, 16, 16) pooled pairs, equally many of each.
    """

    def __init__(self, candidates: Tensor, reference: Tensor) -> None:
        self._candidates = _unit(centre_windows(_band_pass(candidates))).T.contiguous()  # (2744, M)
        self._reference = _unit(centre_windows(_band_pass(reference))).T.contiguous()

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pooled scan (1+K, 16, 16, 16), as if `own_copy` of the same shape were a candidate too.

        One matrix product a scan, of a shape that no other patient can change: the sum's rounding, and with it
        the bin, is then a function of this scan alone.
        """
        queries = _unit(variants(_band_pass(scan[None])[0]))  # (54, 2744)
        best = (queries @ self._candidates).max()
        if own_copy is not None:
            best = torch.maximum(best, (queries @ _unit(centre_windows(_band_pass(own_copy[None]))).T).max())
        return float(best - (queries @ self._reference).max())


def _band_pass(pooled: Tensor) -> Tensor:
    """(N, C, 16, 16, 16) -> (N, 1, 16, 16, 16): the pooled image minus its Gaussian blur."""
    image = pooled[:, 0]
    blur = _blur_matrix(SIDE)
    low: Tensor = torch.einsum("nijk,ai,bj,ck->nabc", image, blur, blur, blur)
    return (image - low)[:, None]


def _blur_matrix(side: int) -> Tensor:
    """(side, side): Gaussian weights of every voxel for every output; rows sum to one, also at the rim."""
    position = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((position[:, None] - position) / _SIGMA) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def _unit(windows: Tensor) -> Tensor:
    """(N, 1, 14, 14, 14) -> (N, 2744) with zero mean and length one; a flat window becomes zero."""
    flat = windows.flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    length = flat.square().sum(dim=1, keepdim=True).sqrt().clamp(min=_EPSILON)
    return flat / length
