"""How small a leak this audit could see, from public numbers alone, before any answer is opened."""

from __future__ import annotations

from common.measure.audit_plan import AuditPlan, EndpointPlan
from common.measure.membership import Exceedance, discrete_laplace_variance, smallest_detectable_copies

PROBABILITY = 0.9
_THRESHOLD = 0.75  # of the public unit: non-members' upper tail was found between 0.5 and 1 on phantoms
_SLACK = 1.5  # the threshold's false-positive rate overshoots the plan's by up to a bin


def planned_smallest_copies(plan: AuditPlan, endpoint: EndpointPlan) -> float:
    """Smallest detectable share of copied members from the plan's expected sizes and noise.

    Every bin above the threshold adds its noise; where the threshold falls is not known yet, so that a typical place
    is assumed. The power achieved at the real threshold is computed afterwards and the worse of the two counts.
    """
    sites = len(plan.sites) or plan.quorum
    members, nonmembers = sites * plan.expected_members, sites * plan.expected_nonmembers
    tail = sum(edge >= _THRESHOLD for edge in endpoint.edges)
    noise = sites * tail * discrete_laplace_variance(plan.epsilon_per_answer)
    expected = Exceedance(
        members=0.0,
        nonmembers=_SLACK * plan.false_positive_rate,
        member_draws=members,
        nonmember_draws=nonmembers,
        member_noise=2 * noise / members**2,  # two halves, each noised
        nonmember_noise=noise / nonmembers**2,
    )
    return smallest_detectable_copies(expected, plan.copy_confidence, PROBABILITY)
