"""What must hold before anything is released. Each policy reads the evidence and states its objections.

Policies are pure and know nothing of each other; `gate.decide` combines them. No policy can be switched off, and a
decision is never changed: who hands out volumes that the gate refused (`server.release.bypass`) makes a folder that
says UNSAFE everywhere and that `consilium verify` refuses.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, NoisedCounts, Plan
from common.settings.study import AuditSettings, ReleaseSettings, Study
from server.audit.result import AuditResult
from server.course import chosen_by, rule_of
from server.release.audit_policies import (
    AuditPassed,
    ControlsCaught,
    GroupsComparable,
    InferenceWithin,
    MechanismConsistent,
    NearCopiesRare,
    PowerSufficient,
)
from server.release.evidence import Objection, Policy, ReleaseEvidence, SiteStatement, Spending

# Of a study's release settings: those for which a larger value allows more.
THRESHOLDS = (
    "max_auc",
    "max_auc_site",
    "max_tpr",
    "max_detectable_copies",
    "max_copied_share",
    "max_inference_lift",
    "max_blind_auc",
)
_COMMITMENT = re.compile(r"[0-9a-f]{64}")


def default_policies(study: Study) -> tuple[Policy, ...]:
    """All policies, with the study's own thresholds. A data-protection officer may add more, never remove one."""
    return (
        SitesConsented(),
        SitesStated(),
        NotResearch(),
        EpsilonWithin(cap=study.privacy.epsilon_cap),
        HoldoutCommitted(),
        ReceiptsHold(),
        GroupsComparable(),
        AuditPassed(),
        ControlsCaught(),
        PowerSufficient(),
        NearCopiesRare(),
        MechanismConsistent(),
        InferenceWithin(),
        *([] if study.course is None else [CourseKept()]),
    )


@dataclass(frozen=True)
class SitesConsented:
    """Enough sites took part, each under its own policy."""

    name: str = "sites-consented"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Too few sites, or an answer of a site that never enrolled."""
        quorum = evidence.study.federation.quorum
        if len(set(evidence.sites)) < quorum:
            yield Objection.refuse(f"{len(set(evidence.sites))} sites took part; the study needs {quorum}")
        for site in sorted(evidence.statements.keys() - set(evidence.sites)):
            yield Objection.refuse(f"{site} made a statement but is not one of the sites that took part")


@dataclass(frozen=True)
class SitesStated:
    """Each site's ledger says what the plan says, and two accountants agree on what that costs."""

    name: str = "sites-stated"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """A missing statement cannot be judged; one that contradicts the plan is refused."""
        if (evidence.study.warm_up is None) != (evidence.plan.warm_up is None):
            yield Objection.refuse("the plan and the study differ about a warm-up")
        for site in sorted(set(evidence.sites)):
            statement = evidence.statements.get(site)
            if statement is None:
                yield Objection.cannot_tell(f"{site} has not stated what it spent")
                continue
            if statement.study_digest != evidence.study_digest:
                yield Objection.refuse(f"{site} made its statement about another study")
            yield from _training_objections(site, statement, evidence.plan)
            yield from _warm_up_objections(site, statement, evidence.plan)
            yield from _answer_objections(site, statement, evidence.audit)
            for cohort, spending in _cohorts(statement):
                yield from _accounting_objections(f"{site} {cohort}", spending, evidence.study.privacy.delta)


@dataclass(frozen=True)
class NotResearch:
    """Nothing was trained or answered without noise. Research simulations do; they are never released."""

    name: str = "not-research"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """A plan without noise, or an exact answer in any ledger."""
        if evidence.study.privacy.target_epsilon is None or evidence.plan.mechanism.noise_multiplier == 0:
            yield Objection.refuse("the plan trains without noise: a research simulation")
        for site, statement in sorted(evidence.statements.items()):
            for cohort, spending in _cohorts(statement):
                exact = Counter(m.question for m in spending.mechanisms if isinstance(m, ExactAnswer))
                for question, times in exact.items():
                    often = f", {times} times" if times > 1 else ""
                    yield Objection.refuse(f"{site} answered {question!r} about its {cohort} without noise{often}")
                for mechanism in spending.mechanisms:
                    if isinstance(mechanism, GaussianRelease) and mechanism.noise_multiplier == 0:
                        yield Objection.refuse(f"{site} released a sum over its {cohort} without noise")
                    elif isinstance(mechanism, DpSgd) and mechanism.noise_multiplier == 0 and mechanism.steps:
                        yield Objection.refuse(f"{site} trained on its {cohort} without noise")


@dataclass(frozen=True)
class CourseKept:
    """Where the course of training was followed: the rule's own choice is released, and every answer was paid for."""

    name: str = "course-kept"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Another round than the rule chooses, an answer that was used without a price, or one without noise."""
        settings, course = evidence.study.course, evidence.course
        if settings is None or course is None:
            yield Objection.cannot_tell("what the sites answered in the course of training is not known")
            return
        if course.exact or settings.exact:
            yield Objection.refuse("the round was chosen by exact answers about patients: a research simulation")
        chosen = chosen_by(course, rule_of(settings)).row
        if chosen is not None and chosen.weights_digest != evidence.generator_digest:
            yield Objection.refuse(
                f"the generator is not that of round {chosen.round}, which the rule chooses in the course of training"
            )
        for site, statement in sorted(evidence.statements.items()):
            paid = math.fsum(m.epsilon for m in statement.nonmembers.mechanisms if isinstance(m, NoisedCounts))
            audited = evidence.audit is not None and site in evidence.audit.sites
            due = course.epsilon_of(site) + ((evidence.audit and audited and evidence.audit.epsilon_nonmembers) or 0.0)
            if paid < due * (1 - 1e-9):
                yield Objection.refuse(
                    f"{site} nonmembers: the ledger shows epsilon {paid:g} for noised answers; audit and course of "
                    f"training cost {due:g}"
                )


@dataclass(frozen=True)
class EpsilonWithin:
    """No patient of any site has spent more than `cap`, members or not, audit and utility included."""

    cap: float
    name: str = "epsilon-within"

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap must be > 0, got {self.cap}")

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """The upper end of epsilon above the cap."""
        for site, statement in sorted(evidence.statements.items()):
            for cohort, spending in _cohorts(statement):
                # `not <=` so that a NaN objects.
                if not spending.epsilon.upper <= self.cap:
                    yield Objection.refuse(
                        f"{site} {cohort} have spent epsilon {spending.epsilon.upper:.3f} "
                        f"(delta {spending.delta:g}), above {self.cap:g}"
                    )


@dataclass(frozen=True)
class HoldoutCommitted:
    """Who was held out was fixed before training, at each site on its own."""

    name: str = "holdout-committed"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """No commitment, a malformed one, or one that two sites share (salts make that impossible by chance)."""
        owners: dict[str, str] = {}
        for site, statement in sorted(evidence.statements.items()):
            commitment = statement.holdout_commitment
            if not _COMMITMENT.fullmatch(commitment):
                yield Objection.refuse(f"{site} has not committed to its hold-out")
            elif commitment in owners:
                yield Objection.refuse(f"{site} and {owners[commitment]} share one hold-out commitment")
            owners.setdefault(commitment, site)


@dataclass(frozen=True)
class ReceiptsHold:
    """Each site signed what it did, with the key it enrolled with, and signed nothing else than it said."""

    name: str = "receipts-hold"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """A missing receipt cannot be judged; one that does not hold, or a key of two sites, is refused."""
        owners: dict[str, str] = {}
        for site, statement in sorted(evidence.statements.items()):
            receipt = statement.receipt
            if receipt is None or receipt.envelope is None:
                yield Objection.cannot_tell(f"{site} has not signed a receipt")
                continue
            yield from (Objection.refuse(f"{site}: {problem}") for problem in receipt.problems)
            if receipt.key in owners:
                yield Objection.refuse(f"{site} and {owners[receipt.key]} share one receipt key")
            owners.setdefault(receipt.key, site)


def coarser_than_default(study: Study) -> tuple[str, ...]:
    """Where the study allows more, or looks less closely, than the default thresholds; one sentence each."""
    allows_more: Sequence[tuple[str, float, float]] = (
        *(
            (f"release.{name}", getattr(study.release, name), ReleaseSettings.model_fields[name].default)
            for name in THRESHOLDS
        ),
        *(
            (f"audit.{name}", getattr(study.audit, name), AuditSettings.model_fields[name].default)
            for name in ("false_positive_rate", "planted_fraction")
        ),
    )
    found = [f"{name} is {value:g}; the default is {usual:g}" for name, value, usual in allows_more if value > usual]
    found += [f"audit: {text}" for text in _left_out(study.audit)]
    if study.release.valid_days > ReleaseSettings.model_fields["valid_days"].default:
        found.append(f"release.valid_days is {study.release.valid_days}; the default is 365")
    if study.release.unsafe_bypass:
        found.append("release.unsafe_bypass is set: the gate may be overruled; the default forbids it")
    usual_confidence = AuditSettings.model_fields["confidence"].default
    if study.audit.confidence < usual_confidence:
        found.append(f"audit.confidence is {study.audit.confidence:g}; the default is {usual_confidence:g}")
    return tuple(found)


def _left_out(audit: AuditSettings) -> list[str]:
    """What this audit does not do, or does less of, than the default one."""
    usual = AuditSettings()
    missing = [
        *(f"no attack {name.value}" for name in usual.attacks if name not in audit.attacks),
        *(f"question {name.value} not asked" for name in usual.questions if name not in audit.questions),
    ]
    less = ("volumes", "inversion_steps", "canaries", "holdout_fraction")
    return missing + [
        f"{name} is {getattr(audit, name):g}; the default is {getattr(usual, name):g}"
        for name in less
        if getattr(audit, name) < getattr(usual, name)
    ]


def _cohorts(statement: SiteStatement) -> tuple[tuple[str, Spending], ...]:
    return (("members", statement.members), ("nonmembers", statement.nonmembers))


def _training_objections(site: str, statement: SiteStatement, plan: Plan) -> Iterator[Objection]:
    """The ledger's training must be the plan's, and at least as much of it as the coordinator used."""
    steps = 0
    for mechanism in statement.members.mechanisms:
        if not isinstance(mechanism, DpSgd):
            continue
        steps += mechanism.steps
        planned = plan.mechanism
        same = (planned.noise_multiplier, planned.sampling_probability, planned.unit)
        if (mechanism.noise_multiplier, mechanism.sampling_probability, mechanism.unit) != same:
            yield Objection.refuse(f"{site} trained under another mechanism than the plan's")
    used = statement.rounds * plan.steps_per_round
    if steps < used:
        yield Objection.refuse(f"{site} states {steps} training steps, but its replies took {used}")
    if any(isinstance(mechanism, DpSgd) for mechanism in statement.nonmembers.mechanisms):
        yield Objection.refuse(f"{site} trained on patients that it held out")


def _warm_up_objections(site: str, statement: SiteStatement, plan: Plan) -> Iterator[Objection]:
    """The ledger's warm-up must be the plan's, and be there if the coordinator used it."""
    stated = [m for m in statement.members.mechanisms if isinstance(m, GaussianRelease)]
    if any(mechanism != plan.warm_up for mechanism in stated):
        yield Objection.refuse(f"{site} made another warm-up release than the plan's")
    if statement.released and not stated:
        yield Objection.refuse(f"{site} states no warm-up release, but its sums were used")
    if any(isinstance(mechanism, GaussianRelease) for mechanism in statement.nonmembers.mechanisms):
        yield Objection.refuse(f"{site} made a warm-up release of patients that it held out")


def _answer_objections(site: str, statement: SiteStatement, audit: AuditResult | None) -> Iterator[Objection]:
    """What a site answered to the audit must be in its ledger."""
    if audit is None or site not in audit.sites:
        return
    charges = {"members": audit.epsilon_members, "nonmembers": audit.epsilon_nonmembers}
    for cohort, spending in _cohorts(statement):
        paid = math.fsum(m.epsilon for m in spending.mechanisms if isinstance(m, NoisedCounts))
        charge = charges[cohort]
        if charge is None:
            yield Objection.refuse(f"{site} {cohort}: the audit's answers had no noise, and so no price")
        elif paid < charge * (1 - 1e-9):
            yield Objection.refuse(
                f"{site} {cohort}: the ledger shows epsilon {paid:g} for noised answers; the audit cost {charge:g}"
            )


def _accounting_objections(who: str, spending: Spending, delta: float) -> Iterator[Objection]:
    if spending.delta != delta:
        yield Objection.refuse(f"{who}: epsilon is stated for delta {spending.delta:g}, the study's is {delta:g}")
    first, second = spending.epsilon, spending.second_opinion
    if math.isinf(first.upper) and math.isinf(second):
        return
    # Renyi is an upper bound, some per cent loose: below the lower end, or far above, one of the two is wrong.
    if not first.lower <= second <= 1.5 * first.upper + 0.5:
        yield Objection.refuse(
            f"{who}: two accountants disagree on epsilon ({first.accountant} {first.lower:.3f} to {first.upper:.3f}, "
            f"rdp {second:.3f})"
        )
