"""What an attack's two error rates prove about epsilon, and the most that so many patients could have proved.

Every (epsilon, delta) mechanism obeys TPR <= e^epsilon FPR + delta at every site, for every threshold, and with members
and non-members exchanged. Shares of several sites obey it too when both sides carry the same site weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from scipy.special import ndtri

from common.measure.epsilon_bounds import EpsilonBound
from common.measure.intervals import Bound, Side
from common.measure.membership import Exceedance
from common.measure.one_run import gaussian_epsilon


def clopper_pearson_epsilon(at: Sequence[Exceedance], *, delta: float, confidence: float) -> EpsilonBound:
    """For any mechanism, from thresholds that were fixed before the members' scores were seen.

    at: one threshold, or several; the level is divided by their number [Bonferroni].
    delta: in [0, 1); 0 gives a bound that is too high by about delta / FPR against a claim with delta.
    Raises ValueError without a threshold.
    """
    return _bound(
        at,
        lambda fpr, fnr: epsilon_of_errors(fpr, fnr, delta),
        method="Clopper-Pearson limits of both error rates",
        assumption="",
        delta=delta,
        confidence=confidence,
    )


def gaussian_curve_epsilon(at: Sequence[Exceedance], *, delta: float, confidence: float) -> EpsilonBound:
    """For a mechanism whose trade-off curve is that of one Gaussian release; otherwise as `clopper_pearson_epsilon`.

    delta: in (0, 1); no Gaussian release has a finite epsilon at 0.
    """
    return _bound(
        at,
        lambda fpr, fnr: gaussian_epsilon(gaussian_mu_of_errors(fpr, fnr), delta),
        method="Clopper-Pearson limits of both error rates, Gaussian curve",
        assumption="the mechanism's trade-off curve is that of a Gaussian release",
        delta=delta,
        confidence=confidence,
    )


def epsilon_of_errors(fpr: float, fnr: float, delta: float) -> float:
    """max(ln((1 - delta - FNR) / FPR), ln((1 - delta - FPR) / FNR), 0)  [Jagielski et al. 2020; Nasr et al. 2021]

    fpr, fnr: upper limits, above 0.
    """
    return max(math.log(max(1 - delta - b, a) / a) for a, b in ((fpr, fnr), (fnr, fpr)))


def gaussian_mu_of_errors(fpr: float, fnr: float) -> float:
    """max(z(1 - FPR) - z(FNR), 0)  [Dong et al. 2022; Nasr et al. 2023]

    fpr, fnr: upper limits, above 0.
    """
    return max(float(-ndtri(fpr) - ndtri(fnr)), 0.0) if max(fpr, fnr) < 1 else 0.0


def _bound(
    at: Sequence[Exceedance],
    epsilon: Callable[[float, float], float],
    *,
    method: str,
    assumption: str,
    delta: float,
    confidence: float,
) -> EpsilonBound:
    """The best of the thresholds, and what the best would have been with every member above and nobody else."""
    if not at:
        raise ValueError("an epsilon bound needs a threshold")
    level = 1 - (1 - confidence) / (2 * len(at))  # each threshold has two limits, and all of them hold together

    def best(seen: Sequence[Exceedance]) -> float:
        return max(epsilon(*_error_limits(each, level)) for each in seen)

    perfect = [
        Exceedance(members=replace(a.members, value=1.0), nonmembers=replace(a.nonmembers, value=0.0)) for a in at
    ]
    return EpsilonBound(
        method=method,
        assumption=assumption,
        value=Bound(value=best(at), side=Side.LOWER, confidence=confidence),
        ceiling=best(perfect),
        delta=delta,
    )


def _error_limits(at: Exceedance, confidence: float) -> tuple[float, float]:
    """Upper limits of the false-positive and the false-negative rate."""
    return at.nonmembers.upper(confidence), 1 - at.members.lower(confidence)
