"""What the hospital allows: an order passes every line of its policy, or nothing is done. Default deny.

A coordinator can only tighten: what an order asks for is compared with the site's own policy file, and
with the study that the hospital approved by its digest. Nothing here looks at data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import assert_never

from client.orders import order_kind
from common.errors import PolicyRefusal
from common.privacy.accounting import epsilon
from common.privacy.mechanism import Plan, Unit
from common.protocol.messages import (
    CanaryOrder,
    CourseOrder,
    EnrolOrder,
    Order,
    ScoreOrder,
    SegmenterSource,
    StatementOrder,
    TrainOrder,
    UtilityOrder,
    WarmUpOrder,
)
from common.settings.site import SitePolicy
from common.settings.study import Study


def check(
    order: Order,
    *,
    policy: SitePolicy,
    study: Study,
    coordinator_key: str,
    code: str,
    now: datetime,
    simulated: bool,
) -> None:
    """Raise PolicyRefusal, listing every objection, unless the policy allows the order.

    study, coordinator_key: as enrolled, or as an EnrolOrder brings them; the study is already matched with its digest.
    code: digest of the code in this process. now: aware time. simulated: whether this site's randomness is seeded.
    """
    objections = [
        *_site_objections(order, policy, now, simulated),
        *approval_objections(policy, order.study_digest, coordinator_key, code),
        *study_objections(policy, study),
        *_order_objections(order, policy, study, simulated=simulated),
    ]
    if objections:
        raise PolicyRefusal(
            f"this site's policy does not allow the order {order_kind(order).value!r}; nothing was done: "
            + "; ".join(objections)
            + ". The hospital decides in its policy.yaml."
        )


def _site_objections(order: Order, policy: SitePolicy, now: datetime, simulated: bool) -> Iterator[str]:
    today = now.astimezone(UTC).date()
    if today > policy.expires:
        yield f"the policy expired on {policy.expires.isoformat()}"
    if order_kind(order) not in policy.orders:
        yield f"`orders` does not name {order_kind(order).value!r}"
    if simulated and not policy.simulation:
        yield "the site's randomness is seeded and `simulation` is not set"


def approval_objections(policy: SitePolicy, study_digest: str, coordinator_key: str, code: str) -> Iterator[str]:
    """What an approval fixes to the letter: the study, whose it is, and the code that may look at patients for it."""
    approval = policy.approval(study_digest)
    if approval is None:
        yield f"`studies` does not name {study_digest[:16]}"
    elif approval.coordinator_key != coordinator_key:
        yield (
            f"{study_digest[:16]} is approved for the coordinator key {approval.coordinator_key[:16]}, "
            f"not for {coordinator_key[:16]}"
        )
    if code not in policy.code_digests:
        yield f"`code_digests` does not name the installed code {code[:16]}"


def study_objections(policy: SitePolicy, study: Study) -> Iterator[str]:
    """What the policy's bounds say against a study, approved or not."""
    privacy, training = study.privacy, study.training
    if study.purpose not in policy.purposes:
        yield "`purposes` does not name the study's purpose"
    if privacy.delta > policy.delta_cap:
        yield f"delta {privacy.delta:g} is above `delta_cap` {policy.delta_cap:g}"
    if privacy.target_epsilon is None:
        if not policy.research_answers:
            yield "the study trains without noise and `research_answers` is not set"
    elif privacy.target_epsilon > policy.epsilon_cap:
        yield f"target epsilon {privacy.target_epsilon:g} is above `epsilon_cap` {policy.epsilon_cap:g}"
    if study.course is not None and study.course.exact and not policy.research_answers:
        yield "the study's course asks for answers without noise and `research_answers` is not set"
    if training.rounds > policy.maximum_rounds:
        yield f"{training.rounds} rounds are above `maximum_rounds` {policy.maximum_rounds}"
    steps = training.rounds * training.critic_steps_per_round
    if steps > policy.maximum_steps:
        yield f"{steps} steps are above `maximum_steps` {policy.maximum_steps}"


def _order_objections(order: Order, policy: SitePolicy, study: Study, *, simulated: bool) -> Iterator[str]:
    match order:
        case WarmUpOrder():
            yield from plan_objections(order.plan, policy, study)
        case TrainOrder():
            yield from plan_objections(order.plan, policy, study)
            if not 1 <= order.round <= order.plan.rounds:
                yield f"round {order.round} is not one of 1..{order.plan.rounds}"
        case CourseOrder():
            yield from _course_objections(order, policy, study, simulated=simulated)
        case UtilityOrder():
            if order.source is SegmenterSource.REAL and not policy.research_answers:
                yield "an exact answer was asked for and `research_answers` is not set"
            if order.training_steps != study.utility.training_steps:
                yield f"{order.training_steps} segmenter steps are not the study's {study.utility.training_steps}"
        case EnrolOrder() | CanaryOrder() | ScoreOrder() | StatementOrder():
            pass
        case _:
            assert_never(order)


def _course_objections(order: CourseOrder, policy: SitePolicy, study: Study, *, simulated: bool) -> Iterator[str]:
    if order.exact and not policy.research_answers:
        yield "an exact answer was asked for and `research_answers` is not set"
    if order.exact and not simulated:
        yield "an exact answer was asked for and this site is not simulated"
    if study.course is not None and order.training_steps != study.course.training_steps:
        yield f"{order.training_steps} segmenter steps are not the study's {study.course.training_steps}"


def plan_objections(plan: Plan, policy: SitePolicy, study: Study) -> Iterator[str]:
    """Compare the plan with the approved study where the study fixes it, and with the policy where it does not."""
    mechanism = plan.mechanism
    if plan_facts(plan) != study_facts(study):
        yield f"the plan {plan_facts(plan)} is not the study's {study_facts(study)}"
    if mechanism.unit is not Unit.PATIENT:
        yield f"the plan protects a {mechanism.unit.value}, not a patient"
    if mechanism.steps > policy.maximum_steps:
        yield f"{mechanism.steps} steps are above `maximum_steps` {policy.maximum_steps}"
    if plan_facts(plan) != study_facts(study) or mechanism.steps > policy.maximum_steps:
        return  # nor is a stranger's number of steps accounted for: that could take all memory
    for part in plan.mechanisms:
        if part.noise_multiplier < policy.minimum_noise and not (
            part.noise_multiplier == 0 and policy.research_answers
        ):
            yield f"noise multiplier {part.noise_multiplier:g} is below `minimum_noise` {policy.minimum_noise:g}"
    spent = epsilon(plan.mechanisms, plan.delta).upper
    # The relative slack is for another machine's last digits, not for another plan.
    if plan.target_epsilon is not None and spent > plan.target_epsilon * (1 + 1e-6):
        yield f"the plan spends epsilon {spent:.4f}, more than the target {plan.target_epsilon:g} it states"
    if plan.warm_up is not None and study.warm_up is not None and plan.target_epsilon is not None:
        share = study.warm_up.share * plan.target_epsilon
        released = epsilon([plan.warm_up], plan.delta).upper
        # Neither more nor less: a plan that understates the warm-up leaves training more than its part of the target.
        if not math.isclose(released, share, rel_tol=1e-6):
            yield f"the warm-up spends epsilon {released:.4f}, not the study's share of {share:g}"


def plan_facts(plan: Plan) -> dict[str, float | None]:
    """Return what a study fixes about its plan. The noise is not in it: it follows from these by calibration."""
    return {
        "target_epsilon": plan.target_epsilon,
        "delta": plan.delta,
        "sampling_probability": plan.mechanism.sampling_probability,
        "clip_norm": plan.clip_norm,
        "divisor": plan.divisor,
        "rounds": plan.rounds,
        "steps_per_round": plan.steps_per_round,
        "warm_ups": int(plan.warm_up is not None),
    }


def study_facts(study: Study) -> dict[str, float | None]:
    """Return the same facts as the approved study states them."""
    privacy, training = study.privacy, study.training
    return {
        "target_epsilon": privacy.target_epsilon,
        "delta": privacy.delta,
        "sampling_probability": privacy.sampling_probability,
        "clip_norm": privacy.clip_norm,
        "divisor": privacy.sampling_probability * privacy.reference_patients,
        "rounds": training.rounds,
        "steps_per_round": training.critic_steps_per_round,
        "warm_ups": int(study.warm_up is not None),
    }
