"""What the report says about attacks: what was tried, what was not, and what a number means."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_example import example_audit_alone, example_facts, example_study

from common.measure.audit_plan import Endpoint
from common.settings.study import AttackName
from server.audit.assurance_chapters import controls
from server.audit.attack_chapters import attacks, positive_predictive_value, read_curve
from server.audit.decision_chapters import decision
from server.audit.document import Chapter, Table
from server.audit.facts import AuditedScans, ReportFacts
from server.audit.markdown import chapter_lines
from server.audit.threats import ATTACKS, carried_out, not_tested, resolvable
from server.audit.wording import statements, tpr_limit

RATES = st.floats(0, 1)


def audit_without(facts: ReportFacts, **changes) -> ReportFacts:
    return replace(facts, audit=replace(facts.audit, **changes))


def chapter_text(chapter: Chapter) -> str:
    return " ".join(chapter_lines(chapter)).replace("\\", "")


def low_rates(facts: ReportFacts) -> Table:
    return next(b for b in attacks(facts).blocks if isinstance(b, Table) and "few people" in b.caption)


@pytest.mark.parametrize("name", [*Endpoint, *AttackName])
def test_every_attack_and_endpoint_is_described_for_people(name):
    assert ATTACKS[name.value].how.endswith(".")


def test_a_study_names_its_attacks():
    study = example_study(audit={"attacks": ("near_copy", "nearest")})
    assert AuditedScans.of_study(study).attacks == ("near_copy", "nearest")


def test_what_was_tried_is_not_listed_as_untested_and_what_was_not_is():
    everything = example_facts(everything=True)
    text = " ".join(not_tested(everything))
    for words in ("Inversion", "attributes", "set membership", "canaries", "critics"):
        assert words not in text
    bare = audit_without(everything, inference=None, critic=None, mechanism=None)
    few = replace(
        audit_without(
            bare,
            endpoints=tuple(
                replace(e, set_membership=()) for e in bare.audit.endpoints if e.name is not Endpoint.INVERSION
            ),
        ),
        scans=replace(bare.scans, attacks=("near_copy",)),
    )
    text = " ".join(not_tested(few))
    for words in ("Inversion", "attributes", "set membership", "canaries", "critics", "nearest synthetic"):
        assert words in text


def test_attacks_that_need_a_reference_population_are_untested_without_one():
    facts = example_facts()
    assert any("no reference population" in line for line in not_tested(facts))
    with_both = replace(
        facts, scans=replace(facts.scans, attacks=(*facts.scans.attacks, "density_ratio", "substitute"))
    )
    assert not any("eference population" in line for line in not_tested(with_both))


def test_without_a_usable_result_nothing_counts_as_carried_out():
    facts = example_facts(audited=False)
    assert carried_out(facts) == ()
    assert not_tested(facts)[0].startswith("Everything")


def test_linking_and_timing_are_never_said_to_be_tested():
    text = " ".join(not_tested(example_facts(everything=True)))
    assert "two releases" in text
    assert "Running times" in text


def test_groups_that_were_not_drawn_at_random_are_named_as_such():
    assert any("not drawn at random" in line for line in not_tested(example_audit_alone()))
    assert not any("not drawn at random" in line for line in not_tested(example_facts()))


def test_a_rate_that_so_few_patients_cannot_resolve_has_no_number():
    (row, *_) = low_rates(example_facts()).rows
    assert row[1].startswith("0.7 %")
    assert row[2] == "not resolvable with n = 490"
    facts = example_facts()
    many = audit_without(facts, endpoints=tuple(replace(e, nonmembers=2000) for e in facts.audit.endpoints))
    assert "not resolvable" not in str(low_rates(many).rows)


@pytest.mark.parametrize(("nonmembers", "rate", "can"), [(100, 0.01, True), (99, 0.01, False), (999, 1e-3, False)])
def test_a_rate_is_resolvable_when_somebody_is_expected_to_be_accused(nonmembers, rate, can):
    endpoint = replace(example_facts().audit.endpoints[0], nonmembers=nonmembers)
    assert resolvable(endpoint, rate) is can


def test_the_curve_is_read_between_bin_edges_as_a_coin_toss():
    endpoint = example_facts().audit.endpoints[0]
    left, right = next(
        (a, b) for a, b in zip(endpoint.roc, endpoint.roc[1:], strict=False) if b.false_positive_rate > 0.1
    )
    middle = read_curve(endpoint, (left.false_positive_rate + right.false_positive_rate) / 2)
    assert middle.true_positive_rate == pytest.approx((left.true_positive_rate + right.true_positive_rate) / 2)


def test_an_accusation_at_one_in_a_thousand_is_mostly_wrong():
    assert positive_predictive_value(0.06, 0.01, 1e-3) == pytest.approx(6e-5 / (6e-5 + 0.999e-2))
    assert positive_predictive_value(1.0, 0.0, 1e-3) == 1
    assert positive_predictive_value(0.0, 0.0, 0.5) == 0


def test_a_control_that_missed_is_said_to_have_missed():
    facts = example_facts()
    first, *others = facts.audit.endpoints
    blind = replace(first, planted=replace(first.planted, detected=False), null=replace(first.null, passed=False))
    changed = audit_without(facts, endpoints=(blind, *others))
    marks = [row[3] for row in controls(changed).blocks[0].rows]
    assert [(mark.text, mark.good) for mark in marks[:2]] == [
        ("a difference, or too little data", False),
        ("missed", False),
    ]
    assert all(mark.good for mark in marks[2:])


def test_coarser_thresholds_are_named_as_deviations_and_their_absence_too():
    coarse = chapter_text(decision(example_facts(coarser=("release.max_auc is 0.7; the default is 0.6",))))
    assert "release.max_auc is 0.7" in coarse
    assert "no threshold is coarser" not in coarse
    assert "no threshold is coarser" in chapter_text(decision(example_facts()))


@given(RATES, RATES, RATES)
def test_a_predictive_value_is_a_probability_and_grows_with_prevalence(tpr, fpr, prevalence):
    value = positive_predictive_value(tpr, fpr, prevalence)
    assert 0 <= value <= 1
    assert value <= positive_predictive_value(tpr, fpr, min(1.0, prevalence + 0.1)) + 1e-12


@given(st.floats(0, 20), st.floats(0, 0.1), RATES)
def test_the_proven_limit_never_lies_below_guessing_and_never_above_one(epsilon, delta, rate):
    assert rate - 1e-12 <= tpr_limit(epsilon, delta, rate) <= 1


@pytest.mark.parametrize(("epsilon", "odds"), [(0.0, "1.0"), (1.0, "2.8"), (8.01, "3,100"), (1e5, "power of 43430")])
def test_what_epsilon_means_is_rounded_up_and_never_overflows(epsilon, odds):
    facts = example_facts(audited=False)
    spent = facts.campaign.decision.sites["site-1"].members.model_copy(update={"upper": epsilon})
    sites = {
        "site-1": facts.campaign.decision.sites["site-1"].model_copy(update={"members": spent, "nonmembers": spent})
    }
    decision = facts.campaign.decision.model_copy(update={"sites": sites})
    (proven,) = [
        s.text
        for s in statements(replace(facts, campaign=replace(facts.campaign, decision=decision)))
        if s.topic == "What is proven"
    ]
    assert f"at most {odds} (" in proven or odds in proven
    assert tpr_limit(epsilon, 1e-5, 0.01) <= 1


@pytest.mark.parametrize(("epsilon", "rate", "limit"), [(1, 0.01, 0.027), (2, 0.01, 0.074), (4, 0.001, 0.055)])
def test_the_proven_limit_is_that_of_the_notes(epsilon, rate, limit):
    assert tpr_limit(epsilon, 1e-5, rate) == pytest.approx(limit, abs=6e-4)
