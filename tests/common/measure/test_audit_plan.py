import dataclasses
from pathlib import Path

import pytest

from common.measure.audit_plan import AuditPlan, Endpoint, EndpointPlan, default_edges, endpoints_of, make_plan
from common.settings.load import load_study
from common.settings.study import AttackName
from tests.tiny_studies import tiny_audit_plan

PLAN = tiny_audit_plan(study="demo", sites=("site-1", "site-2"), quorum=2, epsilon_per_answer=0.7)


def test_a_plan_survives_json_with_the_same_digest():
    back = AuditPlan.from_json(PLAN.to_json())
    assert back == PLAN
    assert back.digest == PLAN.digest


def test_any_change_of_the_plan_changes_its_digest():
    edges = (*default_edges()[:-1], 2.0000001)
    moved = dataclasses.replace(PLAN, endpoints=(PLAN.endpoints[0], EndpointPlan(name=Endpoint.NEAR_COPY, edges=edges)))
    assert moved.digest != PLAN.digest
    assert dataclasses.replace(PLAN, epsilon_per_answer=0.70000001).digest != PLAN.digest


def test_a_plan_states_what_it_charges_and_nonmembers_pay_the_planted_control_too():
    assert [m.epsilon for m in PLAN.member_mechanisms] == [0.7, 0.7, 0.5, 0.7, 0.5]  # two scores, three questions
    assert [m.epsilon for m in PLAN.nonmember_mechanisms] == [0.7, 0.7, 0.7, 0.7, 0.5, 0.7, 0.5]
    assert PLAN.epsilon_members == pytest.approx(3.1)
    assert PLAN.epsilon_nonmembers == pytest.approx(4.5)


def test_what_is_not_asked_costs_nothing():
    silent = dataclasses.replace(PLAN, questions=())
    assert [m.epsilon for m in silent.member_mechanisms] == [0.7, 0.7]
    assert set(silent.answers) == {"fused", "near_copy"}


def test_exact_answers_have_no_price_and_no_noise():
    exact = dataclasses.replace(PLAN, epsilon_per_answer=None, epsilon_per_question=None)
    assert exact.epsilon_members is None
    assert all(asked.noise().variance == 0 for asked in exact.answers.values())
    with pytest.raises(ValueError, match="no finite epsilon"):
        _ = exact.member_mechanisms


def test_inversion_is_reported_where_it_is_in_the_plan_and_the_fused_score_always():
    assert endpoints_of([AttackName.NEAR_COPY]) == (Endpoint.FUSED, Endpoint.NEAR_COPY)
    assert Endpoint.INVERSION in endpoints_of([AttackName.NEAR_COPY, AttackName.INVERSION])


def test_json_that_is_not_a_valid_plan_is_refused():
    assert '"quorum":2' in PLAN.to_json()
    for text in ("{}", PLAN.to_json().replace('"quorum":2', '"quorum":"two"'), PLAN.to_json().replace("0.7", "-1")):
        with pytest.raises(ValueError, match=r".+"):
            AuditPlan.from_json(text)


def test_edges_that_do_not_increase_are_refused():
    for edges in ((0.0, 0.0), (1.0, 0.5), (0.0,), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="edges"):
            EndpointPlan(name=Endpoint.FUSED, edges=edges)


def test_a_plan_made_from_a_study_holds_public_settings_only_and_expects_its_holdout():
    study = load_study(Path(__file__).parents[3] / "deploy" / "studies" / "demo.yaml")
    plan = make_plan(study, ["site-1", "site-2", "site-3"])
    assert plan.sites == ("site-1", "site-2", "site-3")
    assert plan.expected_members == study.privacy.reference_patients
    share = plan.expected_nonmembers / (plan.expected_members + plan.expected_nonmembers)
    assert share == pytest.approx(study.audit.holdout_fraction, abs=0.01)
    assert plan.digest == make_plan(study, ["site-1", "site-2", "site-3"]).digest != make_plan(study).digest
