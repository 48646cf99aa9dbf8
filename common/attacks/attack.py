"""What every membership attack is: a score of one scan against public material, larger for a member."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Attack(Protocol):
    """A raw score. Depends on the scan, on public volumes or weights and on constants, never on another patient."""

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pair (1+K, D, H, W) float32 at full resolution; larger is more member-like.

        own_copy: a pair of the same shape, treated as one more synthetic volume for this scan alone. So copies can be
        planted for a control without any patient's copy being seen by another.
        """
        ...
