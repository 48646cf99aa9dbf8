"""The judgement on guesses about canaries: what is a violation, what says nothing, and who is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.measure.one_run import GUESS_RULES, Guesses, guess
from common.privacy.accounting import epsilon
from common.privacy.mechanism import DpSgd, GaussianRelease, Plan
from server.audit.mechanism import heard_mu, judge_mechanism
from server.audit.result import MechanismAudit, MechanismVerdict

CANARIES = 400


def plan_of(noise: float = 2.0, probability: float = 0.5, steps: int = 16, **changes: object) -> Plan:
    plan = Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=probability, steps=steps),
        clip_norm=1.0,
        divisor=10.0,
        steps_per_round=steps,
        rounds=1,
        target_epsilon=8.0 if noise else None,
        delta=1e-5,
    )
    return replace(plan, **changes)


def heard(mu: float, seed: int = 0, canaries: int = CANARIES) -> tuple[Guesses, ...]:
    """Guesses of a site whose canaries are heard with this signal / noise."""
    rng = np.random.default_rng(seed)
    inside = rng.random(canaries) < 0.5
    scores = rng.normal(size=canaries) + mu * inside
    return tuple(guess(scores.tolist(), inside.tolist(), rule) for rule in GUESS_RULES)


def judged(plan: Plan, *signals: float, missing: dict[str, str] | None = None) -> MechanismAudit:
    answers = {f"site-{i}": heard(mu, i) for i, mu in enumerate(signals)}
    return judge_mechanism(plan, CANARIES, answers, missing or {}, confidence=0.95)


PLAN = plan_of()
FAITHFUL = heard_mu(PLAN.mechanism)


def test_what_a_faithful_training_gives_is_consistent() -> None:
    found = judged(PLAN, FAITHFUL, FAITHFUL, FAITHFUL)
    assert found.verdict is MechanismVerdict.CONSISTENT
    assert found.reasons == ()
    assert found.canaries == 3 * CANARIES
    assert found.guesses == 3 * 2 * 160
    assert max(b.ceiling for b in found.bounds[:2]) > found.claimed_epsilon


def test_canaries_that_stand_out_are_a_violation_and_the_reason_says_what_is_claimed() -> None:
    found = judged(PLAN, 12.0, 12.0, 12.0)
    assert found.verdict is MechanismVerdict.VIOLATION
    assert any("all sites together" in reason and f"{found.claimed_epsilon:.3f}" in reason for reason in found.reasons)


def test_one_bad_site_among_ten_is_named() -> None:
    found = judged(plan_of(noise=4.0), *([heard_mu(plan_of(noise=4.0).mechanism)] * 9), 12.0)
    assert found.verdict is MechanismVerdict.VIOLATION
    assert any(reason.startswith("site-9:") for reason in found.reasons)
    assert not any(reason.startswith("site-3:") for reason in found.reasons)


def test_a_claim_above_every_ceiling_is_uninformative() -> None:
    found = judged(plan_of(noise=0.8), 5.0)
    assert found.claimed_epsilon > max(b.ceiling for b in found.bounds[:2])
    assert found.verdict is MechanismVerdict.UNINFORMATIVE
    assert any("even perfect guesses" in reason for reason in found.reasons)


def test_the_estimate_for_independent_canaries_never_decides() -> None:
    found = judged(PLAN, 2.0)
    assert found.bounds[2].value.value > found.claimed_epsilon > max(b.value.value for b in found.bounds[:2])
    assert found.verdict is MechanismVerdict.CONSISTENT


def test_a_site_that_does_not_answer_leaves_the_claim_unchecked() -> None:
    found = judged(PLAN, FAITHFUL, FAITHFUL, missing={"site-9": "site refused (policy)"})
    assert found.verdict is MechanismVerdict.UNINFORMATIVE
    assert any("site-9 did not answer (site refused (policy))" in reason for reason in found.reasons)


def test_a_violation_stands_whoever_does_not_answer() -> None:
    assert judged(PLAN, 12.0, missing={"site-9": "gone"}).verdict is MechanismVerdict.VIOLATION


def test_without_any_answer_nothing_is_known() -> None:
    found = judge_mechanism(PLAN, CANARIES, {}, {"a": "gone"}, confidence=0.95)
    assert found.verdict is MechanismVerdict.UNINFORMATIVE
    assert (found.canaries, found.bounds) == (0, ())


def test_canaries_that_were_never_in_training_do_not_pass_for_privacy() -> None:
    """The mistake this is for: a trainer that leaves the canaries out, and an audit that finds nothing."""
    found = judged(PLAN, FAITHFUL, 0.0)
    assert found.verdict is MechanismVerdict.UNINFORMATIVE
    assert any(reason.startswith("site-1:") and "heard proves nothing" in reason for reason in found.reasons)


def test_the_claim_is_that_of_training_alone() -> None:
    with_release = replace(PLAN, warm_up=GaussianRelease(noise_multiplier=1.0))
    assert judged(with_release, FAITHFUL).claimed_epsilon == epsilon([PLAN.mechanism], PLAN.delta).upper


def test_what_a_run_without_noise_would_have_shown_is_stated() -> None:
    drawn, hardly = judged(PLAN, FAITHFUL), judged(plan_of(probability=0.02, steps=16), 0.1)
    assert drawn.without_noise == pytest.approx(max(b.ceiling for b in drawn.bounds[:2]), rel=0.02)
    assert 0 < hardly.without_noise < max(b.ceiling for b in hardly.bounds[:2])  # most were never drawn


def test_a_plan_without_noise_has_no_claim() -> None:
    with pytest.raises(ValueError, match="claims no epsilon"):
        judged(plan_of(noise=0.0), 1.0)


def test_a_true_claim_is_called_a_violation_in_at_most_a_twentieth_whatever_the_number_of_sites() -> None:
    """At the claim itself: canaries heard exactly as loud as a Gaussian release of that epsilon would be."""
    plan = plan_of(noise=2.0, probability=1.0, steps=1)
    alarms = [
        judge_mechanism(
            plan, 60, {f"s{i}": heard(0.5, 100 * run + i, 60) for i in range(4)}, {}, confidence=0.95
        ).verdict
        is MechanismVerdict.VIOLATION
        for run in range(200)
    ]
    assert np.mean(alarms) <= 0.05
