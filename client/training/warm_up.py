"""The warm-up release: one noised sum of public features over the members, before any training.

(1) the study's public feature map, computed here and not sent by anybody
(2) one vector a patient, the mean over all of the patient's scans, clipped to a public norm
(3) their sum, noised once and released on a grid; the coordinator divides it by public constants
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from client.cohort import Cohort
from client.randomness import SecureStream
from client.training.noise import noisy
from common.measure.features import CLIP_NORM, FeatureMap
from common.privacy.mechanism import GaussianRelease
from common.protocol.messages import RELEASE_GRID


def release(
    features: FeatureMap, mechanism: GaussianRelease, *, cohort: Cohort, stream: SecureStream
) -> tuple[float, ...]:
    """(d,) sums over the members plus N(0, (noise_multiplier * CLIP_NORM)^2), multiples of RELEASE_GRID.

    No member at all gives noise like any other number of them.
    """
    total = clipped_sum(features, cohort)
    noised = noisy(total, scale=mechanism.noise_multiplier * CLIP_NORM, stream=stream)
    return tuple(float(value) for value in (noised / RELEASE_GRID).round() * RELEASE_GRID)


def clipped_sum(features: FeatureMap, cohort: Cohort) -> Tensor:
    """(d,) float64: one patient more or less, with any scans, moves it by at most CLIP_NORM. Private by noise only."""
    total = torch.zeros(features.size, dtype=torch.float64)
    for patient in cohort.members:
        scans = torch.from_numpy(cohort.scans(patient).astype(np.float32))
        total += clip_patient(features(scans).double().mean(dim=0))
    return total


def clip_patient(features: Tensor) -> Tensor:
    """(d,) -> (d,): bounded to L2 norm <= CLIP_NORM; zero when it is not finite, or its NaN would name its patient."""
    if not features.isfinite().all():
        return torch.zeros_like(features)
    length: Tensor = features.norm()
    return features * (CLIP_NORM / length.clamp(min=CLIP_NORM))
