"""Each policy closes the gate for the one thing it guards; without that, evidence passes."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.measure.intervals import Bound, Interval, Side
from common.privacy.accounting import Epsilon
from common.privacy.mechanism import DpSgd, ExactAnswer, NoisedCounts, Unit
from common.settings.study import AttackName, AuditSettings, Study
from server.audit.result import NullControl, Power, Verdict
from server.release.audit_policies import AuditPassed, ControlsCaught, PowerSufficient
from server.release.evidence import ObjectionKind, ReleaseEvidence, Spending
from server.release.gate import decide
from server.release.policies import (
    EpsilonWithin,
    HoldoutCommitted,
    NotResearch,
    SitesConsented,
    SitesStated,
    coarser_than_default,
    default_policies,
)

DELTA = 1e-4
ROUND = DpSgd(noise_multiplier=1.5, sampling_probability=0.1, steps=10)
ANSWERS = NoisedCounts(epsilon=1.0)
Change = Callable[..., ReleaseEvidence]


def spent(*mechanisms: DpSgd | NoisedCounts | ExactAnswer) -> Spending:
    return Spending(mechanisms=mechanisms, delta=DELTA)


def test_sound_evidence_meets_no_objection(evidence: ReleaseEvidence, study: Study):
    for policy in default_policies(study):
        assert list(policy.objections(evidence)) == [], policy.name


def test_too_few_sites_are_refused(evidence: ReleaseEvidence):
    alone = replace(evidence, sites=("site-1",), statements={"site-1": evidence.statements["site-1"]})
    assert [o.text for o in SitesConsented().objections(alone)] == ["1 sites took part; the study needs 2"]


def test_one_site_named_twice_is_one_site(evidence: ReleaseEvidence):
    twice = replace(evidence, sites=("site-1", "site-1"), statements={"site-1": evidence.statements["site-1"]})
    assert [o.kind for o in SitesConsented().objections(twice)] == [ObjectionKind.REFUSE]


def test_a_statement_of_a_stranger_is_refused(evidence: ReleaseEvidence):
    more = replace(evidence, statements={**evidence.statements, "site-9": evidence.statements["site-1"]})
    assert [o.kind for o in SitesConsented().objections(more)] == [ObjectionKind.REFUSE]


def test_a_site_that_did_not_state_its_spending_cannot_be_judged(evidence: ReleaseEvidence):
    silent = replace(evidence, statements={"site-1": evidence.statements["site-1"]})
    (objection,) = SitesStated().objections(silent)
    assert objection.kind is ObjectionKind.CANNOT_TELL
    assert "site-2" in objection.text


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ((ROUND, ANSWERS), "states 10 training steps, but its replies took 20"),
        ((ROUND, replace(ROUND, noise_multiplier=0.75), ANSWERS), "another mechanism"),
        ((ROUND, replace(ROUND, sampling_probability=0.05), ANSWERS), "another mechanism"),
        ((ROUND, ROUND), "the audit cost 1"),
    ],
    ids=["a round is missing", "half the noise", "rarer draws", "the audit is missing"],
)
def test_a_ledger_that_contradicts_plan_or_audit_is_refused(
    evidence: ReleaseEvidence, change_site: Change, members: tuple[DpSgd | NoisedCounts, ...], words: str
):
    objections = list(SitesStated().objections(change_site(evidence, members=spent(*members))))
    assert [o.kind for o in objections] == [ObjectionKind.REFUSE]
    assert words in objections[0].text


def test_a_ledger_of_patches_instead_of_patients_is_refused(evidence: ReleaseEvidence, change_site: Change):
    patches = replace(ROUND, unit=Unit.PATCH)
    found = SitesStated().objections(change_site(evidence, members=spent(patches, patches, ANSWERS)))
    assert "another mechanism" in next(iter(found)).text


def test_training_on_patients_that_were_held_out_is_refused(evidence: ReleaseEvidence, change_site: Change):
    found = list(SitesStated().objections(change_site(evidence, nonmembers=spent(ROUND, NoisedCounts(epsilon=2.0)))))
    assert ["trained on patients that it held out" in o.text for o in found] == [True]


def test_a_statement_about_another_study_or_delta_is_refused(evidence: ReleaseEvidence, change_site: Change):
    (study,) = SitesStated().objections(change_site(evidence, study_digest="f" * 64))
    assert "another study" in study.text
    loose = Spending(mechanisms=(ROUND, ROUND, ANSWERS), delta=1e-2)
    (delta,) = SitesStated().objections(change_site(evidence, members=loose))
    assert "stated for delta 0.01" in delta.text


class DisagreeingSpending(Spending):
    """A first accountant that reports a tenth of the truth, as a broken one would."""

    @property
    def epsilon(self) -> Epsilon:  # type: ignore[override]
        return Epsilon(value=0.1, lower=0.1, upper=0.1, delta=DELTA, accountant="prv")


def test_accountants_that_disagree_are_refused(evidence: ReleaseEvidence, change_site: Change):
    broken = DisagreeingSpending(mechanisms=(ROUND, ROUND, ANSWERS), delta=DELTA)
    (objection,) = SitesStated().objections(change_site(evidence, members=broken))
    assert "two accountants disagree" in objection.text


def test_epsilon_is_compared_at_its_upper_end_for_both_cohorts(evidence: ReleaseEvidence, change_site: Change):
    upper = evidence.statements["site-1"].members.epsilon.upper
    assert list(EpsilonWithin(cap=upper).objections(evidence)) == []
    found = list(EpsilonWithin(cap=upper - 1e-6).objections(evidence))
    assert len(found) == 2  # the members of both sites
    held_out = change_site(evidence, nonmembers=spent(NoisedCounts(epsilon=9.0)))
    (objection,) = EpsilonWithin(cap=8.0).objections(held_out)
    assert objection.text.startswith("site-1 nonmembers have spent epsilon 9.000")


@pytest.mark.parametrize("cohort", ["members", "nonmembers"])
@pytest.mark.parametrize(
    "mechanism", [ExactAnswer(question="dice"), DpSgd(noise_multiplier=0.0, sampling_probability=0.1, steps=1)]
)
def test_anything_without_noise_is_research_and_refused(
    evidence: ReleaseEvidence, change_site: Change, cohort: str, mechanism: ExactAnswer | DpSgd
):
    changed = change_site(evidence, **{cohort: spent(mechanism)})
    assert [o.kind for o in NotResearch().objections(changed)] == [ObjectionKind.REFUSE]
    assert any("inf" in o.text for o in EpsilonWithin(cap=8.0).objections(changed))


def test_exact_answers_to_one_question_are_one_reason_that_counts_them(
    evidence: ReleaseEvidence, change_site: Change
) -> None:
    points = [ExactAnswer(question="course")] * 3
    changed = change_site(evidence, members=spent(*points, ExactAnswer(question="dice")))
    reasons = [o.text for o in NotResearch().objections(changed)]
    assert [reason.partition(" answered ")[2] for reason in reasons] == [
        "'course' about its members without noise, 3 times",
        "'dice' about its members without noise",
    ]


@pytest.mark.parametrize("commitment", ["", "not-a-hash", "1" * 64], ids=["none", "malformed", "of site-2"])
def test_a_holdout_without_its_own_commitment_is_refused(
    evidence: ReleaseEvidence, change_site: Change, commitment: str
):
    changed = change_site(evidence, holdout_commitment=commitment)
    assert [o.kind for o in HoldoutCommitted().objections(changed)] == [ObjectionKind.REFUSE]


def test_no_audit_cannot_be_judged(evidence: ReleaseEvidence):
    assert [o.kind for o in AuditPassed().objections(replace(evidence, audit=None))] == [ObjectionKind.CANNOT_TELL]


def test_an_audit_of_other_weights_is_refused(evidence: ReleaseEvidence):
    (objection,) = AuditPassed().objections(replace(evidence, generator_digest="0" * 64))
    assert objection.kind is ObjectionKind.REFUSE
    assert "other weights" in objection.text


def test_an_audit_under_bent_thresholds_is_refused(evidence: ReleaseEvidence, change_audit: Change):
    audit = evidence.audit
    assert audit is not None
    bent = change_audit(evidence, thresholds=replace(audit.thresholds, max_auc=0.9))
    (objection,) = AuditPassed().objections(bent)
    assert "judged with max_auc 0.9; the study says 0.6" in objection.text
    (objection,) = AuditPassed().objections(change_audit(evidence, false_positive_rate=0.1))
    assert "false_positive_rate" in objection.text


def test_an_audit_without_an_answer_of_every_site_cannot_tell(evidence: ReleaseEvidence, change_audit: Change):
    (objection,) = AuditPassed().objections(change_audit(evidence, sites=("site-1",)))
    assert objection.kind is ObjectionKind.CANNOT_TELL


@pytest.mark.parametrize(("field", "value"), [("auc_upper", 0.6001), ("tpr_upper", 0.0601)])
def test_a_pass_whose_bound_exceeds_its_threshold_is_not_believed(
    evidence: ReleaseEvidence, change_audit: Change, field: str, value: float
):
    bound = Bound(value=value, side=Side.UPPER, confidence=0.95)
    (objection,) = AuditPassed().objections(change_audit(evidence, endpoint={field: bound}))
    assert objection.kind is ObjectionKind.CANNOT_TELL
    assert f"{value:.3f}" in objection.text


def test_missed_controls_cannot_tell(evidence: ReleaseEvidence, change_audit: Change):
    audit = evidence.audit
    assert audit is not None
    planted = replace(audit.endpoints[0].planted, detected=False)
    (missed,) = ControlsCaught().objections(change_audit(evidence, endpoint={"planted": planted}))
    assert missed.kind is ObjectionKind.CANNOT_TELL
    biased = NullControl(auc=Interval(low=0.55, estimate=0.6, high=0.65, confidence=0.95), passed=False)
    (found,) = ControlsCaught().objections(change_audit(evidence, endpoint={"null": biased}))
    assert found.kind is ObjectionKind.CANNOT_TELL


def test_too_little_power_cannot_tell_and_the_threshold_itself_suffices(
    evidence: ReleaseEvidence, change_audit: Change
):
    enough = change_audit(evidence, endpoint={"power": Power(probability=0.9, planned=0.05, achieved=0.05)})
    assert list(PowerSufficient().objections(enough)) == []
    weak = change_audit(evidence, endpoint={"power": Power(probability=0.9, planned=0.04, achieved=0.0501)})
    (objection,) = PowerSufficient().objections(weak)
    assert objection.kind is ObjectionKind.CANNOT_TELL


def test_default_thresholds_are_not_called_coarse(study: Study):
    assert coarser_than_default(study) == ()


def test_an_audit_that_does_less_than_the_default_is_called_coarse(study: Study):
    less = AuditSettings(
        attacks=(AttackName.NEAR_COPY,), questions=(), volumes=16, inversion_steps=0, canaries=0, holdout_fraction=0.1
    )
    release = study.release.model_copy(update={"valid_days": 4000})
    coarse = "; ".join(coarser_than_default(study.model_copy(update={"audit": less, "release": release})))
    for word in ("no attack nearest", "no attack inversion", "label_size not asked", "critic not asked"):
        assert word in coarse
    for word in (
        "volumes is 16",
        "inversion_steps is 0",
        "canaries is 0",
        "holdout_fraction is 0.1",
        "valid_days is 4000",
    ):
        assert word in coarse


def test_every_coarser_threshold_is_named_with_both_numbers(study: Study):
    release = study.release.model_copy(update={"max_auc": 0.75, "max_tpr": 0.2, "max_detectable_copies": 0.3})
    audit = AuditSettings().model_copy(update={"false_positive_rate": 0.1, "confidence": 0.9, "planted_fraction": 0.3})
    coarse = coarser_than_default(study.model_copy(update={"release": release, "audit": audit}))
    assert coarse == (
        "release.max_auc is 0.75; the default is 0.6",
        "release.max_tpr is 0.2; the default is 0.06",
        "release.max_detectable_copies is 0.3; the default is 0.05",
        "audit.false_positive_rate is 0.1; the default is 0.01",
        "audit.planted_fraction is 0.3; the default is 0.05",
        "audit.confidence is 0.9; the default is 0.95",
    )


def test_stricter_thresholds_are_not_called_coarse(study: Study):
    stricter = study.release.model_copy(update={"max_auc": 0.55, "max_tpr": 0.02})
    assert coarser_than_default(study.model_copy(update={"release": stricter})) == ()


def test_the_verdict_of_a_failed_audit_refuses_with_its_own_reasons(evidence: ReleaseEvidence, change_audit: Change):
    failed = change_audit(evidence, verdict=Verdict.FAIL, reasons=("2.0% of members are near copies",))
    assert decide(failed, [AuditPassed()]).reasons == ("audit: 2.0% of members are near copies",)
