"""Pooled pairs that the attacks read, and the search over shifts and a left-right flip.

A volume of any grid is pooled to 16 voxels an axis. Synthetic volumes are seen through the centre 14-voxel window of
that; a scan through the same window after it was moved, and mirrored. A copy that was shifted by up to a sixteenth of
the grid, or mirrored, meets a variant that undoes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.generator.sampling import LatentToPairs, sample_batches

SIDE = 16  # pooled voxels an axis
MARGIN = 1  # largest shift of `variants`, in pooled voxels
WINDOW = SIDE - 2 * MARGIN
VARIANTS = 2 * (2 * MARGIN + 1) ** 3  # 27 shifts, each as is and mirrored


def pool(pairs: Tensor) -> Tensor:
    """(N, C, D, H, W) float32 -> (N, C, 16, 16, 16) by averaging; a finer grid is needed on no axis."""
    return F.adaptive_avg_pool3d(pairs, SIDE)


def pooled_draws(generator: LatentToPairs, *, seed: int, first: int, count: int, device: str = "cpu") -> Tensor:
    """(count, 1+K, 16, 16, 16): volumes first .. first + count - 1, only one batch of them at full size at a time."""
    batches = sample_batches(generator, seed=seed, first=first, count=count, device=device)
    return torch.cat([pool(torch.from_numpy(pairs)) for pairs in batches])


def centre_windows(pooled: Tensor) -> Tensor:
    """(N, C, 16, 16, 16) -> (N, C, 14, 14, 14)."""
    inside = slice(MARGIN, MARGIN + WINDOW)
    return pooled[:, :, inside, inside, inside]


def variants(pooled: Tensor) -> Tensor:
    """One scan (C, 16, 16, 16) -> (54, C, 14, 14, 14): every window, as is and mirrored along the first axis."""
    both = torch.stack([pooled, pooled.flip(1)])  # (2, C, 16, 16, 16); axis i is left-right in RAS+
    windows = both.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1).unfold(4, WINDOW, 1)  # (2, C, 3, 3, 3, 14, 14, 14)
    order = windows.permute(0, 2, 3, 4, 1, 5, 6, 7)
    return order.reshape(VARIANTS, pooled.shape[0], WINDOW, WINDOW, WINDOW)
