"""What is asked beside membership: attribute inference, the blind baseline, and whether a site's critic tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from common.attacks.label_size import QUESTION
from common.measure.audit_plan import AuditPlan
from common.measure.intervals import Interval, Side
from common.measure.membership import Estimate, Stratum, exceedance, stratified_auc
from common.measure.noised_counts import CountNoise, rate_lower, rate_upper
from common.protocol.messages import ScoreReply
from server.audit.result import AttributeInference, BlindBaseline, CriticControl

_RIGHT = 0  # the edge between guessed wrong and guessed right


def attribute_inference(strata: Sequence[Stratum], confidence: float) -> AttributeInference:
    """Shares of members and of non-members for whom the question was answered right, sites weighted alike.

    strata: two bins, wrong and right. Variance: binomial sampling and privacy noise of both groups.
    """
    at = exceedance(strata, _RIGHT)
    members, nonmembers = (
        Estimate(value=share.value, variance=share.variance) for share in (at.members, at.nonmembers)
    )
    lift = Estimate(value=members.value - nonmembers.value, variance=members.variance + nonmembers.variance)
    return AttributeInference(
        question=QUESTION,
        members=members.interval(confidence),
        nonmembers=nonmembers.interval(confidence),
        lift=lift.interval(confidence),
        lower=lift.bound(Side.LOWER, confidence),
        upper=lift.bound(Side.UPPER, confidence),
    )


def blind_baseline(strata: Sequence[Stratum], confidence: float, limit: float) -> BlindBaseline:
    """AUC of the score that ignores the generator; passed when its interval lies inside (1 - limit, limit).

    The interval is two-sided with `confidence` on each side: a difference in either direction is one.
    """
    auc = stratified_auc(strata).interval(2 * confidence - 1)
    return BlindBaseline(auc=auc, passed=bool(1 - limit < auc.low and auc.high < limit))


def critic_control(answers: Mapping[str, ScoreReply], plan: AuditPlan) -> CriticControl:
    """Share of sites whose critic tells, from bits that are true with probability p = e^eps / (1 + e^eps).

    share = (found / sites - (1 - p)) / (2 p - 1)  [Warner 1965]; the limits are those of Clopper and Pearson (1934)
    for the share that said yes, through the same line.
    """
    epsilon, confidence = plan.epsilon_per_question, plan.confidence
    if epsilon is None:
        raise ValueError("a bit without noise is no randomised response")
    truthful = math.exp(epsilon) / (1 + math.exp(epsilon))
    found, sites = sum(bool(answer.critic_tells) for answer in answers.values()), len(answers)

    def told(said_yes: float) -> float:
        return (said_yes - (1 - truthful)) / (2 * truthful - 1)

    exact, each_side = CountNoise(variance=0.0, fourth=0.0), (1 + confidence) / 2
    low, high = (limit(found, sites, exact, each_side) for limit in (rate_lower, rate_upper))
    return CriticControl(
        sites=sites,
        found=found,
        epsilon=epsilon,
        share=Interval(low=told(low), estimate=told(found / sites), high=told(high), confidence=confidence),
    )
