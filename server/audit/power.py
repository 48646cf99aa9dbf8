"""How small a leak this audit could see, from public numbers alone, before any answer is opened."""

from __future__ import annotations

from common.measure.audit_plan import AuditPlan, EndpointPlan
from common.measure.membership import (
    CountNoise,
    Exceedance,
    discrete_laplace_noise,
    shared_level,
    smallest_detectable_copies,
)

PROBABILITY = 0.9
_THRESHOLD = 1.0  # of the public unit: candidate volumes end there, copies of phantoms scored above it


def planned_smallest_copies(plan: AuditPlan, endpoint: EndpointPlan) -> float:
    """Smallest detectable share of copied members from the plan's expected sizes and noise.

    Every bin above the threshold adds its noise; where the threshold falls is not known yet, so that a typical place
    is assumed. The power achieved at the real threshold is computed afterwards and the worse of the two counts.
    """
    sites = len(plan.sites) or plan.quorum
    members, nonmembers = sites * plan.expected_members, sites * plan.expected_nonmembers
    tail = sum(edge >= _THRESHOLD for edge in endpoint.edges)
    noise = sites * tail * discrete_laplace_noise(plan.epsilon_per_answer).variance
    expected = Exceedance(
        members=0.0,
        nonmembers=plan.false_positive_rate,
        member_draws=members,
        nonmember_draws=nonmembers,
        member_noise=CountNoise(variance=2 * noise / members**2, fourth=0.0),  # two halves, each noised
        nonmember_noise=CountNoise(variance=noise / nonmembers**2, fourth=0.0),
    )
    return smallest_detectable_copies(expected, shared_level(plan.copy_confidence, tail), PROBABILITY)
