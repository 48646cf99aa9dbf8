"""Each condition on the audit, broken alone: the policies of G0 to G7."""

from dataclasses import replace

import pytest

from common.measure.audit_plan import Endpoint
from common.measure.epsilon_bounds import EpsilonBound
from common.measure.intervals import Bound, Interval, Side
from common.settings.study import Question
from server.audit.result import MechanismVerdict
from server.release.audit_policies import GroupsComparable, InferenceWithin, MechanismConsistent, NearCopiesRare
from server.release.evidence import ObjectionKind
from server.release.gate import decide
from server.release.policies import THRESHOLDS, default_policies

REFUSE, CANNOT_TELL = ObjectionKind.REFUSE, ObjectionKind.CANNOT_TELL


def kinds(policy, evidence):
    return [objection.kind for objection in policy.objections(evidence)]


def interval(low: float, high: float) -> Interval:
    return Interval(low=low, estimate=(low + high) / 2, high=high, confidence=0.9)


@pytest.mark.parametrize("auc", [interval(0.5, 0.56), interval(0.44, 0.5)])
def test_groups_that_differ_without_the_generator_leave_the_outcome_open(evidence, change_audit, auc):
    biased = change_audit(evidence, blind=replace(evidence.audit.blind, auc=auc))
    assert kinds(GroupsComparable(), biased) == [CANNOT_TELL]


def test_copies_that_are_shown_refuse_and_copies_that_are_not_ruled_out_leave_it_open(evidence, change_audit):
    near = next(i for i, e in enumerate(evidence.audit.endpoints) if e.name is Endpoint.NEAR_COPY)

    def with_near_copy(**changes):
        endpoints = list(evidence.audit.endpoints)
        endpoints[near] = replace(endpoints[near], **changes)
        return change_audit(evidence, endpoints=tuple(endpoints))

    shown = with_near_copy(copies_lower=Bound(value=0.001, side=Side.LOWER, confidence=0.99))
    possible = with_near_copy(copies_upper=Bound(value=0.07, side=Side.UPPER, confidence=0.95))
    assert kinds(NearCopiesRare(), shown) == [REFUSE]
    assert kinds(NearCopiesRare(), possible) == [CANNOT_TELL]


def test_a_violation_of_the_mechanism_refuses_and_an_uninformative_audit_of_it_does_not(evidence, change_audit):
    def judged(verdict, *reasons, ceiling=9.0):
        value = Bound(value=0.0, side=Side.LOWER, confidence=0.95)
        bound = EpsilonBound(method="m", assumption="", value=value, ceiling=ceiling, delta=1e-4)
        mechanism = replace(evidence.audit.mechanism, verdict=verdict, reasons=reasons, bounds=(bound,))
        return change_audit(evidence, mechanism=mechanism)

    assert kinds(MechanismConsistent(), judged(MechanismVerdict.VIOLATION, "epsilon is at least 9")) == [REFUSE]
    too_few = judged(MechanismVerdict.UNINFORMATIVE, "even perfect guesses would prove 2", ceiling=2.0)
    assert kinds(MechanismConsistent(), too_few) == []
    unheard = judged(MechanismVerdict.UNINFORMATIVE, "site-1 did not answer")
    assert kinds(MechanismConsistent(), unheard) == [CANNOT_TELL]


def test_a_lift_that_is_not_ruled_out_leaves_the_outcome_open(evidence, change_audit):
    above = replace(evidence.audit.inference, upper=Bound(value=0.051, side=Side.UPPER, confidence=0.95))
    assert kinds(InferenceWithin(), change_audit(evidence, inference=above)) == [CANNOT_TELL]


@pytest.mark.parametrize(
    ("policy", "field"),
    [(GroupsComparable(), "blind"), (MechanismConsistent(), "mechanism"), (InferenceWithin(), "inference")],
)
def test_what_the_study_asks_for_and_nobody_measured_leaves_the_outcome_open(evidence, change_audit, policy, field):
    more = {"canaries": 100, "questions": tuple(Question)}
    asking = evidence.study.model_copy(update={"audit": evidence.study.audit.model_copy(update=more)})
    assert kinds(policy, replace(change_audit(evidence, **{field: None}), study=asking)) == [CANNOT_TELL]


@pytest.mark.parametrize("policy", [GroupsComparable(), MechanismConsistent(), InferenceWithin(), NearCopiesRare()])
def test_what_holds_is_not_objected_to(evidence, policy):
    assert kinds(policy, evidence) == []


def test_every_condition_on_the_audit_is_a_default_policy_and_holds_the_gate_alone(evidence, change_audit):
    biased = change_audit(evidence, blind=replace(evidence.audit.blind, auc=interval(0.5, 0.56)))
    names = {policy.name for policy in default_policies(evidence.study)}
    assert {"groups-comparable", "near-copies-rare", "mechanism-consistent", "inference-within"} <= names
    assert decide(biased, default_policies(evidence.study)).outcome.value == "INCONCLUSIVE"


def test_every_limit_of_a_study_is_compared_with_its_default(study):
    limits = {name for name in type(study.release).model_fields if name.startswith("max_")}
    assert limits == set(THRESHOLDS)
