"""Answers of sites become one point: what is missing never looks good, and what is exact never looks free."""

from dataclasses import replace

import numpy as np
import pytest

from common.measure.course import CheckpointRule
from common.protocol.messages import AttackAuc, CourseReply, ExactCourse, FidelityAnswer, FidelityMeasure, LedgerHead
from server.audit.course_chapter import _fidelity
from server.course import Asked, Course, chosen_by, pooled, proven_auc, rule_of
from tests.tiny_studies import tiny_study

PAID = tiny_study(course={"every_rounds": 1})
EXACT = tiny_study(course={"every_rounds": 1, "answers": "exact"})
DIGESTS = {"a": "a" * 64, "b": "b" * 64}
FACTS = ExactCourse(
    members=60,
    nonmembers=40,
    hd95_sum_mm=(80.0,),
    fidelity=tuple(FidelityAnswer(measure=m, value=2.0) for m in FidelityMeasure),
    critic=AttackAuc(auc=0.9, deviation=0.03),
    critic_control=AttackAuc(auc=0.5, deviation=0.05),
    generator=AttackAuc(auc=0.5, deviation=0.04),
    generator_control=AttackAuc(auc=0.5, deviation=0.05),
)


def reply(*, patients: float = 400.0, dice: float = 0.5, exact: ExactCourse | None = None) -> CourseReply:
    return CourseReply(
        study_digest="5" * 64,
        round=1,
        weights_digest="c" * 64,
        dice_sum=(patients * dice,),
        patients=patients,
        epsilon=None if exact else 0.25,
        exact=exact,
        ledger_head=LedgerHead(rows=1, hash="e" * 64),
    )


def asked(*, exact: bool, number: int = 1, spent: float | None = 1.0) -> Asked:
    return Asked(
        round=number, weights_digest=f"{number:064x}", epsilon_spent=spent, epsilon_answer=None if exact else 0.25
    )


def exact_row(a: ExactCourse, b: ExactCourse, number: int = 1):
    replies = {"a": reply(patients=a.nonmembers, exact=a), "b": reply(patients=b.nonmembers, exact=b)}
    return pooled(EXACT, asked(exact=True, number=number), replies, digests=DIGESTS, missing={})


def test_sites_are_pooled_by_their_patients_and_noise_widens_the_interval():
    row = pooled(
        PAID,
        asked(exact=False),
        {"a": reply(patients=300.0, dice=0.4), "b": reply(patients=100.0, dice=0.8)},
        digests=DIGESTS,
        missing={},
    )
    assert row.point.utility.estimate == pytest.approx(0.5)
    without = (1.96 * np.sqrt(0.5 * 0.5 / 400)).item()
    assert row.point.utility.high - row.point.utility.estimate > without
    assert not row.point.exact
    assert row.epsilon_answer == 0.25


def test_a_paid_point_is_bounded_by_what_was_spent_and_says_that_nothing_was_attacked():
    both = {"a": reply(), "b": reply()}
    row = pooled(PAID, asked(exact=False, spent=2.0), both, digests=DIGESTS, missing={})
    assert not row.attacked
    assert row.point.generator_attack.high == pytest.approx(proven_auc(2.0, 1e-3))
    unprotected = pooled(PAID, asked(exact=False, spent=None), both, digests=DIGESTS, missing={})
    assert unprotected.point.generator_attack.high == 1.0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 0.0), (1.0, 1e-3), (3.0, 0.05), (8.0, 1e-6)])
def test_the_proven_auc_is_the_area_under_the_largest_curve(epsilon: float, delta: float):
    fpr = np.linspace(0, 1, 200_001)
    curve = np.minimum(np.minimum(np.exp(epsilon) * fpr + delta, 1 - np.exp(-epsilon) * (1 - delta - fpr)), 1)
    assert proven_auc(epsilon, delta) == pytest.approx(np.trapezoid(curve, fpr), abs=1e-5)


@pytest.mark.parametrize("site", ["a", "b"])
def test_an_attack_that_failed_at_one_site_is_unknown_and_no_rule_lets_it_pass(site: str):
    """Fails when a missing score counts as a good one, or the other site's score stands for both."""
    failed = replace(FACTS, generator=None)
    row = exact_row(*((failed, FACTS) if site == "a" else (FACTS, failed)))
    assert not row.attacked
    assert (row.point.generator_attack.low, row.point.generator_attack.high) == (0.0, 1.0)
    course = Course(labels=("vessel",), exact=True, feature_net="", feature_net_digest="", rows=(row,))
    assert chosen_by(course, CheckpointRule(max_auc=0.999, max_epsilon=None)).row is None


def test_a_site_too_small_for_an_auc_leaves_the_others_measurement_standing():
    tiny = replace(FACTS, members=60, nonmembers=1, generator=None, critic=None)
    row = exact_row(FACTS, tiny)
    assert row.attacked
    assert row.point.generator_attack.estimate == pytest.approx(0.5)


def test_aucs_and_fidelity_are_weighted_by_patients_and_distances_by_the_held_out():
    other = replace(
        FACTS,
        members=180,
        nonmembers=120,
        hd95_sum_mm=(120.0,),
        critic=AttackAuc(auc=0.5, deviation=0.03),
        fidelity=tuple(FidelityAnswer(measure=m, value=None if i else 6.0) for i, m in enumerate(FidelityMeasure)),
    )
    row = exact_row(FACTS, other)
    assert row.point.critic_attack.estimate == pytest.approx(0.25 * 0.9 + 0.75 * 0.5)
    assert row.hd95_mm == (pytest.approx(200 / 160),)
    assert row.fidelity[FidelityMeasure.FRECHET] == pytest.approx((60 * 2 + 180 * 6) / 240)
    assert row.fidelity[FidelityMeasure.KERNEL] == 2.0  # only one site could take it


def test_no_interval_of_an_auc_leaves_zero_to_one():
    sure = replace(FACTS, critic=AttackAuc(auc=1.0, deviation=0.1), critic_control=AttackAuc(auc=0.05, deviation=0.1))
    row = exact_row(sure, sure)
    assert row.point.critic_attack.high == 1.0
    assert row.point.critic_attack.low == pytest.approx(1 - 1.96 * 0.1 / 2**0.5, abs=1e-3)
    assert row.critic_control.low == 0.0
    assert row.critic_control.high > 0.1


@pytest.mark.parametrize("missing", [(), (FidelityMeasure.FRECHET, FidelityMeasure.KERNEL)])
def test_the_report_says_which_fidelity_needs_more_members(missing: tuple[FidelityMeasure, ...]):
    answers = tuple(FidelityAnswer(measure=m, value=None if m in missing else 2.0) for m in FidelityMeasure)
    facts = replace(FACTS, fidelity=answers)
    course = Course(
        exact=True, labels=("a",), feature_net="net", feature_net_digest="d" * 64, rows=(exact_row(facts, facts),)
    )
    table = _fidelity(course)
    assert ("Not measured: Fréchet distance" in table.caption) == bool(missing)
    assert len(table.rows) == len(FidelityMeasure) - len(missing)


def test_too_few_sites_or_patients_are_no_point():
    one = pooled(PAID, asked(exact=False), {"a": reply()}, digests=DIGESTS, missing={"b": "paused"})
    assert one.point is None
    assert "quorum" in one.unmeasured
    few = {"a": reply(patients=6.0), "b": reply(patients=4.0)}
    assert pooled(PAID, asked(exact=False), few, digests=DIGESTS, missing={}).point is None


def test_the_choice_is_free_exactly_when_every_answer_was_paid_for():
    paid = pooled(PAID, asked(exact=False), {"a": reply(), "b": reply()}, digests=DIGESTS, missing={})
    course = Course(labels=("vessel",), exact=False, feature_net="", feature_net_digest="", rows=(paid,))
    assert chosen_by(course, rule_of(PAID.course)).free
    exact = Course(
        labels=("vessel",), exact=True, feature_net="n", feature_net_digest="d", rows=(exact_row(FACTS, FACTS),)
    )
    assert not chosen_by(exact, rule_of(EXACT.course)).free
    assert Course.from_json(exact.to_json()) == exact
    assert course.epsilon_of("a") == 0.25
    assert exact.epsilon_of("a") == 0.0
