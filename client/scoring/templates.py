"""Small pooled pairs that both scores read, and the search over shifts and a left-right flip.

A volume of any grid is pooled to 16 voxels an axis. Each score sees a 14-voxel window of it: synthetic volumes
through the centre window only, a patient's scan through all 27 windows and their mirror images. A copy that was
moved by up to a sixteenth of the grid, or mirrored, meets a window that undoes it, with no padding invented.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.generator.sampling import LatentToPairs, sample_batches

SIDE = 16  # pooled voxels an axis
MARGIN = 1  # largest searched shift, in pooled voxels
WINDOW = SIDE - 2 * MARGIN
VARIANTS = 2 * (2 * MARGIN + 1) ** 3  # 27 shifts, each as is and mirrored


def pool(pairs: Tensor) -> Tensor:
    """(N, C, D, H, W) float32 -> (N, C, 16, 16, 16) by averaging; a finer grid is needed on no axis."""
    return F.adaptive_avg_pool3d(pairs, SIDE)


def pooled_draws(generator: LatentToPairs, *, seed: int, first: int, count: int) -> Tensor:
    """(count, 1+K, 16, 16, 16): volumes first .. first + count - 1, only one batch of them at full size at a time."""
    batches = sample_batches(generator, seed=seed, first=first, count=count)
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
