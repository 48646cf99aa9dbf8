import dataclasses
from pathlib import Path

import pytest

from common.measure.audit_plan import AuditPlan, Endpoint, EndpointPlan, default_edges, make_plan
from common.settings.load import load_study

PLAN = AuditPlan(
    score_version=1,
    study="demo",
    sites=("site-1", "site-2"),
    quorum=2,
    endpoints=tuple(EndpointPlan(name=name, edges=default_edges()) for name in Endpoint),
    volumes=1000,
    calibration_volumes=64,
    epsilon_per_answer=0.7,
    planted_fraction=0.05,
    false_positive_rate=0.01,
    confidence=0.95,
    control_confidence=0.995,
    copy_confidence=0.99,
    expected_members=500,
    expected_nonmembers=270,
)


def test_a_plan_survives_json_with_the_same_digest():
    back = AuditPlan.from_json(PLAN.to_json())
    assert back == PLAN
    assert back.digest == PLAN.digest


def test_any_change_of_the_plan_changes_its_digest():
    edges = (*default_edges()[:-1], 2.0000001)
    moved = dataclasses.replace(PLAN, endpoints=(EndpointPlan(name=Endpoint.NEAR_COPY, edges=edges), PLAN.endpoints[1]))
    assert moved.digest != PLAN.digest
    assert dataclasses.replace(PLAN, epsilon_per_answer=0.70000001).digest != PLAN.digest


def test_a_plan_states_what_it_charges_and_nonmembers_pay_the_planted_control_too():
    assert [m.epsilon for m in PLAN.member_mechanisms] == [0.7, 0.7]
    assert [m.epsilon for m in PLAN.nonmember_mechanisms] == [0.7, 0.7, 0.7, 0.7]
    assert PLAN.epsilon_members == pytest.approx(1.4)
    assert PLAN.epsilon_nonmembers == pytest.approx(2.8)


def test_json_that_is_not_a_valid_plan_is_refused():
    assert '"quorum":2' in PLAN.to_json()
    for text in ("{}", PLAN.to_json().replace('"quorum":2', '"quorum":"two"'), PLAN.to_json().replace("0.7", "-1")):
        with pytest.raises(ValueError, match=r".+"):
            AuditPlan.from_json(text)


def test_edges_that_do_not_increase_are_refused():
    for edges in ((0.0, 0.0), (1.0, 0.5), (0.0,), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="edges"):
            EndpointPlan(name=Endpoint.NEAREST, edges=edges)


def test_a_plan_made_from_a_study_holds_public_settings_only_and_expects_its_holdout():
    study = load_study(Path(__file__).parents[3] / "deploy" / "studies" / "demo.yaml")
    plan = make_plan(study, ["site-1", "site-2", "site-3"])
    assert plan.sites == ("site-1", "site-2", "site-3")
    assert plan.expected_members == study.privacy.reference_patients
    share = plan.expected_nonmembers / (plan.expected_members + plan.expected_nonmembers)
    assert share == pytest.approx(study.audit.holdout_fraction, abs=0.01)
    assert plan.digest == make_plan(study, ["site-1", "site-2", "site-3"]).digest != make_plan(study).digest
