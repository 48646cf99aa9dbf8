"""The site's own critic against its own patients: the positive control that never leaves, but for one noised bit.

A critic that was trained without noise tells members from non-members almost perfectly; that is why critics stay. The
bit says whether this one does. Its score, and the AUC, are for nobody else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.randomness import SecureStream
from client.training.state import GameState
from common.measure.membership import Estimate, Stratum, quantile, stratified_auc
from common.measure.noised_counts import EXACT
from common.settings.study import Study

TELLS = 0.75  # AUC that the lower bound must exceed for "the critic gives its members away"
_CONFIDENCE = 0.95


def critic_tells(study: Study, kept: Mapping[str, Tensor], cohort: Cohort, device: str) -> bool:
    """Exact, private: whether the stored critic separates members from non-members with AUC above 0.75.

    White-box LOGAN [Hayes et al. 2019]: the critic's own score, the mean over a patient's scans. False for a cohort in
    which one group is empty.
    """
    if not cohort.members or not cohort.nonmembers:
        return False
    critic = GameState.restore(study, kept, device).critic.eval()
    members, nonmembers = (
        np.array([critic_score(critic, cohort.scans(p), device) for p in group])
        for group in (cohort.members, cohort.nonmembers)
    )
    return auc_lower_bound(members, nonmembers) > TELLS


def auc_lower_bound(members: NDArray[np.float64], nonmembers: NDArray[np.float64]) -> float:
    """One-sided 95 % lower bound of the AUC, exact scores."""
    estimate = exact_auc(members, nonmembers)
    return estimate.value - quantile(_CONFIDENCE) * math.sqrt(estimate.variance)


def exact_auc(members: NDArray[np.float64], nonmembers: NDArray[np.float64]) -> Estimate:
    """P(a member scores higher than a non-member), ties counting half, from exact scores.  [DeLong et al. 1988]"""
    values = np.unique(np.concatenate([members, nonmembers]))
    counts = [np.bincount(np.searchsorted(values, group), minlength=len(values)) for group in (members, nonmembers)]
    stratum = Stratum(
        members=counts[0].astype(np.float64),
        nonmembers=counts[1].astype(np.float64),
        member_noise=EXACT,
        nonmember_noise=EXACT,
    )
    return stratified_auc([stratum])


def randomised_response(truth: bool, epsilon: float, stream: SecureStream) -> bool:
    """Tell the truth with probability e^eps / (1 + e^eps): pure epsilon for everybody it is about.  [Warner 1965]"""
    return truth if stream.bernoulli(1, math.exp(epsilon) / (1 + math.exp(epsilon)))[0] else not truth


def critic_score(critic: torch.nn.Module, scans: NDArray[np.float16], device: str) -> float:
    """Mean of the critic's output over one patient's scans (n, 1+K, D, H, W)."""
    with torch.no_grad():
        return float(critic(torch.from_numpy(scans.astype(np.float32)).to(device)).mean())
