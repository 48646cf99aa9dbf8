"""How small a leak this audit could see, from public numbers alone, before any answer is opened."""

from __future__ import annotations

from common.measure.audit_plan import AuditPlan, EndpointPlan
from common.measure.membership import Exceedance, edges_tried, shared_level, smallest_detectable_copies
from common.measure.noised_counts import Share

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
    rate, answers, asked = plan.false_positive_rate, sites * tail, plan.answers[endpoint.name]
    expected = Exceedance(  # members came in two halves, each noised
        members=Share(value=rate, draws=members, noise=asked.noise(2 * answers).scaled(1 / members)),
        nonmembers=Share(value=rate, draws=nonmembers, noise=asked.noise(answers).scaled(1 / nonmembers)),
    )
    level = shared_level(plan.copy_confidence, edges_tried(tail, rate, nonmembers))
    return smallest_detectable_copies(expected, level, PROBABILITY)
