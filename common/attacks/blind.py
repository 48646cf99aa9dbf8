"""A score that ignores the generator: how much of a scan's contrast is fine structure.

It depends on scanner, noise and anatomy, never on what was trained. If it tells members from non-members, the two were
not drawn from the same patients, and every membership score would find the same difference and call it a leak.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.attacks.near_copy import low_pass
from common.attacks.templates import pool

_EPSILON = 1e-12


def fine_share(scan: Tensor) -> float:
    """Share (0 .. 1) of the pooled image's variance that a blur removes; of a pair (1+K, D, H, W)."""
    image = pool(scan[None])[:, 0]
    fine = image - low_pass(image)
    total = (image - image.mean()).square().sum()
    return float(torch.clamp(fine.square().sum() / (total + _EPSILON), max=1.0))
