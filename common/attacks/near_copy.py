"""Near-copy similarity: does a synthetic volume show this very patient's fine structure?

Band-pass normalised cross-correlation: anatomy that everybody shares is coarse and cancels, grey-value gain and
offset cancel, what is left is the individual pattern. Reads the image only. The scan is moved by up to two steps of a
thirty-second of the grid along each axis (two voxels at 32) and mirrored, 250 variants in all, before it is
pooled: half a pooled voxel matters to fine structure.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from common.attacks.templates import MARGIN, SIDE, WINDOW, centre_windows, pool

STEPS = (-2, -1, 0, 1, 2)  # shifts along each axis, in thirty-seconds of it
SHIFTS = len(STEPS) ** 3
_SIGMA = 1.5  # of the removed low-pass, in pooled voxels
_EPSILON = 1e-6  # a structureless window correlates with nothing instead of dividing by zero


class NearCopy:
    """Raw score of one scan: best correlation with a candidate minus best correlation with a reference volume.

    candidates (M, C, 16, 16, 16), reference (R, C, 16, 16, 16): pooled pairs, of which only the image is read. Without
    a reference nothing is subtracted.
    """

    def __init__(self, candidates: Tensor, reference: Tensor | None) -> None:
        self._candidates = templates(candidates).T.contiguous()  # (2744, M)
        self._reference = None if reference is None else templates(reference).T.contiguous()

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pair (1+K, D, H, W), as if `own_copy` of the same shape were a candidate too.

        One matrix product a scan, of a shape that no other patient can change: the sum's rounding, and with it
        the bin, is then a function of this scan alone.
        """
        queries = moved_queries(scan[0])
        best = (queries @ self._candidates).max()
        if own_copy is not None:
            best = torch.maximum(best, (queries @ templates(pool(own_copy[None])).T).max())
        return float(best if self._reference is None else best - (queries @ self._reference).max())

    def usual(self, scan: Tensor) -> float:
        """Median over candidates of the best correlation with each: how like any of them a scan of this kind is."""
        return float((moved_queries(scan[0]) @ self._candidates).amax(dim=0).median())

    def most_similar(self, scan: Tensor) -> tuple[float, int]:
        """Best correlation with any candidate, and that candidate's number. For the site's own reviewer."""
        best = (moved_queries(scan[0]) @ self._candidates).amax(dim=0)
        return float(best.max()), int(best.argmax())


def templates(pooled: Tensor) -> Tensor:
    """(N, C, 16, 16, 16) -> (N, 2744): centre windows of the band-passed image, mean zero and length one."""
    image = pooled[:, 0]
    return _unit(centre_windows((image - low_pass(image))[:, None]).flatten(1))


def low_pass(images: Tensor) -> Tensor:
    """(N, 16, 16, 16) blurred by 1.5 voxels."""
    blur = _blur_matrix(SIDE).to(images.device)
    low: Tensor = torch.einsum("nijk,ai,bj,ck->nabc", images, blur, blur, blur)
    return low


def moved_queries(image: Tensor) -> Tensor:
    """One image (D, H, W) -> (250, 2744): every shift of it, as is and mirrored, band-passed like `templates`.

    Moving, pooling and blurring are linear along each axis, so all 125 shifts are one product of small matrices.
    """
    axes = [tuple(m.to(image.device) for m in _axis_matrices(n)) for n in image.shape]
    queries = []
    for view in (image, image.flip(0)):  # axis i is left-right in RAS+
        sharp, low = (torch.einsum("ijk,sai,tbj,uck->stuabc", view, *(axis[kind] for axis in axes)) for kind in (0, 1))
        queries.append((sharp - low).reshape(SHIFTS, WINDOW**3))
    return _unit(torch.cat(queries))


@cache
def _axis_matrices(size: int) -> tuple[Tensor, Tensor]:
    """Two of (5, 14, size): `moving_matrices` inside the window; the second blurs before the window."""
    stacked = moving_matrices(size)
    inside = slice(MARGIN, MARGIN + WINDOW)
    return stacked[:, inside].contiguous(), (_blur_matrix(SIDE) @ stacked)[:, inside].contiguous()


@cache
def moving_matrices(size: int) -> Tensor:
    """(5, 16, size): move an axis of `size` voxels by every step, then pool it to 16.

    Voxels beyond the rim repeat the rim's: rolling would carry one side's anatomy to the other.
    """
    identity = torch.eye(size)
    pooled = F.adaptive_avg_pool1d(identity[None], SIDE)[0].T  # (16, size)
    sources = [(torch.arange(size) + round(step * size / 32)).clamp(0, size - 1) for step in STEPS]
    return torch.stack([pooled @ identity[source] for source in sources])


def _blur_matrix(side: int) -> Tensor:
    """(side, side): Gaussian weights of every voxel for every output; rows sum to one, also at the rim."""
    position = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((position[:, None] - position) / _SIGMA) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def _unit(windows: Tensor) -> Tensor:
    """(N, 2744) with zero mean and length one; a flat window becomes zero."""
    flat = windows - windows.mean(dim=1, keepdim=True)
    length = flat.square().sum(dim=1, keepdim=True).sqrt().clamp(min=_EPSILON)
    return flat / length
