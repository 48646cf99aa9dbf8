"""Exact counts on a fine grid, as somebody who audits data of his own has them: the whole judgement, no noise."""

import dataclasses
import json

import numpy as np
import pytest

from common.measure.audit_plan import AuditPlan, EndpointPlan, Group
from common.settings.study import ReleaseSettings
from server.audit.result import AuditResult, Verdict
from server.audit.verdict import judge_counts
from tests.tiny_studies import tiny_audit_plan

EDGES = tuple(np.linspace(-1.0, 3.0, 199).tolist())


def plan() -> AuditPlan:
    exact = tiny_audit_plan(
        epsilon_per_answer=None, questions=(), epsilon_per_question=None, expected_members=800, expected_nonmembers=800
    )
    fine = tuple(EndpointPlan(name=e.name, edges=EDGES) for e in exact.endpoints)
    return dataclasses.replace(exact, endpoints=fine)


def audit(seed: int, copied: float = 0.0, patients: int = 800) -> AuditResult:
    rng, p = np.random.default_rng(seed), plan()

    def with_copies(share: float) -> np.ndarray:
        copies = np.arange(patients) < share * patients
        return np.where(copies, rng.normal(1.8, 0.2, patients), rng.normal(0.5, 0.2, patients))

    counts = {}
    for endpoint in p.endpoints:
        members, half = with_copies(copied), rng.random(patients) < 0.5
        groups = {
            Group.MEMBER_A: members[half],
            Group.MEMBER_B: members[~half],
            Group.NONMEMBER: with_copies(0.0),
            Group.PLANTED: with_copies(p.planted_fraction),
        }
        bins = {group: np.searchsorted(EDGES, values, side="right") for group, values in groups.items()}
        counts[endpoint.name] = {g: np.bincount(b, minlength=endpoint.bins).astype(float) for g, b in bins.items()}
    return judge_counts(p, {"folder": counts}, ReleaseSettings(), weights_digest=None)


def test_exact_counts_on_200_bins_without_a_leak_pass_and_every_number_is_finite():
    result = audit(0)
    assert result.verdict is Verdict.PASS
    assert result.smallest_detectable_copies < 0.05
    json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in the result"))
    assert AuditResult.from_json(result.to_json()) == result


def test_exact_counts_on_200_bins_with_copies_fail():
    result = audit(1, copied=0.05)
    assert result.verdict is Verdict.FAIL
    for e in result.endpoints:
        assert 0 < e.copies_lower.value <= 0.05 <= e.copies_upper.value
        assert e.epsilon_lower is not None
        assert 0 < e.epsilon_lower.value.value <= e.epsilon_lower.ceiling


def test_members_that_all_score_as_copies_give_the_strongest_findings_their_number_allows():
    for e in audit(2, copied=1.0).endpoints:
        assert e.epsilon_lower is not None
        assert e.epsilon_lower.value.value > 0.7 * e.epsilon_lower.ceiling
        assert e.set_membership[0].p_value < 1e-6


def test_nothing_that_is_drawn_lies_outside_what_a_rate_or_a_count_can_be():
    for e in audit(3, copied=0.05).endpoints:
        points = np.array([(p.false_positive_rate, p.true_positive_rate, p.low, p.high) for p in e.roc])
        assert points.min() >= 0
        assert points.max() <= 1
        assert (np.diff(points[:, :2], axis=0) >= 0).all()
        assert all(count >= 0 for histogram in e.histograms for count in histogram.counts)


def test_ten_patients_a_side_are_inconclusive_not_an_error():
    assert audit(4, patients=10).verdict is Verdict.INCONCLUSIVE
