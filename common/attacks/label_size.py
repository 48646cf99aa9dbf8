"""Attribute inference: guess from a patient's image, with the synthetic set as teacher, how much label tissue there is.

The attribute is the amount of labelled tissue, to within 3 %: what a segmentation study holds beside the image, in the
place of a diagnosis. An attacker with the image looks for the synthetic volume most alike and takes its word. A copied
patient's own volume would be that one: members would be guessed better than non-members. Strict on purpose: if a share
f of members is copied and a guess is right by chance with probability p, the lift is f (1 - p) and its variance
goes with p (1 - p), so that a rarely lucky guess shows a leak best.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from common.attacks.templates import centre_windows, pool

QUESTION = "how much labelled tissue there is, to within 3 %"
_WITHIN = 0.03
_FLAT = 1e-3  # grey-value deviation under which an image is blank and is not blown up


class LabelSize:
    """Whether the guess about one scan is right. candidates: (M, 1+K, 16, 16, 16) pooled pairs.

    Depends on the scan, the public volumes and constants only.
    """

    def __init__(self, candidates: Tensor) -> None:
        self._features = _image_features(candidates)  # (M, 343)
        self._sizes = _label_size(candidates)  # (M,)

    def right(self, scan: Tensor) -> bool:
        """Guess from the image of a pair (1+K, D, H, W), compared with its labels."""
        pooled = pool(scan[None])
        distances = (self._features - _image_features(pooled)).square().sum(dim=1)  # (M,)
        guess, truth = float(self._sizes[distances.argmin()]), float(_label_size(pooled)[0])
        return abs(guess - truth) <= _WITHIN * truth


def _image_features(pooled: Tensor) -> Tensor:
    """(N, C, 16, 16, 16) -> (N, 343): the image on a grid of 7, mean zero and deviation one."""
    coarse = F.avg_pool3d(centre_windows(pooled)[:, :1], 2).flatten(1)
    coarse = coarse - coarse.mean(dim=1, keepdim=True)
    return coarse / coarse.square().mean(dim=1, keepdim=True).sqrt().clamp(min=_FLAT)


def _label_size(pooled: Tensor) -> Tensor:
    """(N, C, ...) -> (N,): mean occupancy of all labels together."""
    return pooled[:, 1:].sum(dim=1).flatten(1).mean(dim=1)
