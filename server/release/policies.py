"""What must hold before anything is released. Each policy reads the evidence and states its objections.

Policies are pure and know nothing of each other; `gate.decide` combines them. No policy can be switched off, and a
decision is never changed: who hands out volumes that the gate refused (`server.release.bypass`) makes a folder that
says UNSAFE everywhere and that `consilium verify` refuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Protocol, assert_never

from common.privacy.accounting import Epsilon, epsilon, epsilon_rdp
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, Mechanism, NoisedCounts, Plan
from common.protocol.messages import EnrolReply, ScoreReply, StatementReply
from common.settings.load import study_digest
from common.settings.study import AuditSettings, ReleaseSettings, Study
from server.audit.result import AuditResult, EndpointResult, Verdict
from server.release.receipts import SiteReceipt

_COMMITMENT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What one cohort of one site has spent on the study, as its ledger states it."""

    mechanisms: tuple[Mechanism, ...]
    delta: float

    @cached_property
    def epsilon(self) -> Epsilon:
        """Recomputed here from the mechanisms; a number that a site might state is never used."""
        return epsilon(self.mechanisms, self.delta)

    @cached_property
    def second_opinion(self) -> float:
        """Upper bound on the same epsilon by Renyi divergences."""
        return epsilon_rdp(self.mechanisms, self.delta)


@dataclass(frozen=True, kw_only=True)
class SiteStatement:
    """What one site said at enrolment and at the end.

    rounds: how many of its replies entered the average. released: whether its warm-up was used.
    receipt: what it signed, checked; None when nobody asked for it.
    """

    study_digest: str
    rounds: int
    released: bool = False
    members: Spending
    nonmembers: Spending
    holdout_commitment: str
    policy_digest: str
    code_digest: str
    ledger_head: str
    simulated: bool
    receipt: SiteReceipt | None = None

    @classmethod
    def of(
        cls,
        site: str,
        *,
        enrolled: EnrolReply,
        stated: StatementReply,
        trained: Mapping[int, str],
        scored: ScoreReply | None,
        delta: float,
        released: bool = False,
    ) -> SiteStatement:
        """From a site's own replies.

        trained: digest of its generator that was used, by round. scored: its audit answer. delta: the study's.
        """
        return cls(
            study_digest=stated.study_digest,
            rounds=len(trained),
            released=released,
            members=Spending(mechanisms=stated.members, delta=delta),
            nonmembers=Spending(mechanisms=stated.nonmembers, delta=delta),
            holdout_commitment=enrolled.holdout_commitment,
            policy_digest=enrolled.policy_digest,
            code_digest=enrolled.code_digest,
            ledger_head=stated.ledger_head.hash,
            simulated=enrolled.simulated,
            receipt=SiteReceipt.check(site, enrolled=enrolled, stated=stated, trained=trained, scored=scored),
        )


@dataclass(frozen=True, kw_only=True)
class ReleaseEvidence:
    """Everything the gate looks at.

    sites: names of all sites whose replies entered the generator. statements: by site; one may be missing
    because its site did not answer. audit: None when there was none. simulated: any part of the campaign was.
    generator_digest, candidates_digest: the weights and volumes that would be released.
    """

    study: Study
    plan: Plan
    sites: tuple[str, ...]
    statements: Mapping[str, SiteStatement]
    audit: AuditResult | None
    simulated: bool
    generator_digest: str
    candidates_digest: str

    @cached_property
    def study_digest(self) -> str:
        """SHA-256 of the study's canonical JSON."""
        return study_digest(self.study)


class ObjectionKind(StrEnum):
    """REFUSE: something is known to be wrong. CANNOT_TELL: what would show that it is right is missing."""

    REFUSE = "refuse"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, kw_only=True)
class Objection:
    """Why a policy does not let a release pass, in one sentence with its numbers."""

    kind: ObjectionKind
    text: str


class Policy(Protocol):
    """One condition of a release."""

    @property
    def name(self) -> str:
        """How decisions name it."""
        ...

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Nothing when the condition holds."""
        ...


def default_policies(study: Study) -> tuple[Policy, ...]:
    """All policies, with the study's own thresholds. A data-protection officer may add more, never remove one."""
    return (
        SitesConsented(),
        SitesStated(),
        NotResearch(),
        EpsilonWithin(cap=study.privacy.epsilon_cap),
        HoldoutCommitted(),
        ReceiptsHold(),
        AuditPassed(),
        ControlsCaught(),
        PowerSufficient(),
    )


@dataclass(frozen=True)
class SitesConsented:
    """Enough sites took part, each under its own policy."""

    name: str = "sites-consented"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Too few sites, or an answer of a site that never enrolled."""
        quorum = evidence.study.federation.quorum
        if len(set(evidence.sites)) < quorum:
            yield _refuse(f"{len(set(evidence.sites))} sites took part; the study needs {quorum}")
        for site in sorted(evidence.statements.keys() - set(evidence.sites)):
            yield _refuse(f"{site} made a statement but is not one of the sites that took part")


@dataclass(frozen=True)
class SitesStated:
    """Each site's ledger says what the plan says, and two accountants agree on what that costs."""

    name: str = "sites-stated"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """A missing statement cannot be judged; one that contradicts the plan is refused."""
        if (evidence.study.warm_up is None) != (evidence.plan.warm_up is None):
            yield _refuse("the plan and the study differ about a warm-up")
        for site in sorted(set(evidence.sites)):
            statement = evidence.statements.get(site)
            if statement is None:
                yield _cannot_tell(f"{site} has not stated what it spent")
                continue
            if statement.study_digest != evidence.study_digest:
                yield _refuse(f"{site} made its statement about another study")
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
            yield _refuse("the plan trains without noise: a research simulation")
        for site, statement in sorted(evidence.statements.items()):
            for cohort, spending in _cohorts(statement):
                for mechanism in spending.mechanisms:
                    if isinstance(mechanism, ExactAnswer):
                        yield _refuse(f"{site} answered {mechanism.question!r} about its {cohort} without noise")
                    elif isinstance(mechanism, GaussianRelease) and mechanism.noise_multiplier == 0:
                        yield _refuse(f"{site} released a sum over its {cohort} without noise")
                    elif isinstance(mechanism, DpSgd) and mechanism.noise_multiplier == 0 and mechanism.steps:
                        yield _refuse(f"{site} trained on its {cohort} without noise")


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
                    yield _refuse(
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
                yield _refuse(f"{site} has not committed to its hold-out")
            elif commitment in owners:
                yield _refuse(f"{site} and {owners[commitment]} share one hold-out commitment")
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
                yield _cannot_tell(f"{site} has not signed a receipt")
                continue
            yield from (_refuse(f"{site}: {problem}") for problem in receipt.problems)
            if receipt.key in owners:
                yield _refuse(f"{site} and {owners[receipt.key]} share one receipt key")
            owners.setdefault(receipt.key, site)


@dataclass(frozen=True)
class AuditPassed:
    """The audit of these very weights, under the study's own thresholds, passed."""

    name: str = "audit-passed"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """FAIL refuses; INCONCLUSIVE, or no audit, cannot tell; a PASS is read against its own bounds."""
        audit = evidence.audit
        if audit is None:
            yield _cannot_tell("there was no audit")
            return
        yield from _subject_objections(audit, evidence)
        match audit.verdict:
            case Verdict.FAIL:
                yield from (_refuse(f"audit: {reason}") for reason in audit.reasons)
            case Verdict.INCONCLUSIVE:
                yield from (_cannot_tell(f"audit: {reason}") for reason in audit.reasons)
            case Verdict.PASS:
                yield from _bound_objections(audit, evidence.study.release)
            case _:
                assert_never(audit.verdict)


@dataclass(frozen=True)
class ControlsCaught:
    """The audit works: it saw what was planted and saw nothing where nothing was."""

    name: str = "controls-caught"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Either control missed: the audit says nothing about the generator."""
        for endpoint in _endpoints(evidence):
            if not endpoint.planted.detected:
                yield _cannot_tell(f"audit: {endpoint.name} missed the copies that were planted for it")
            if not endpoint.null.passed:
                yield _cannot_tell(f"audit: {endpoint.name} tells members from other members, so it shows nothing")


@dataclass(frozen=True)
class PowerSufficient:
    """The audit would have seen copies if there were as many as the study tolerates."""

    name: str = "power-sufficient"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Too few patients, or too much noise, to see the tolerated fraction of copies."""
        limit = evidence.study.release.max_detectable_copies
        for endpoint in _endpoints(evidence):
            smallest = endpoint.power.smallest_copies
            if not smallest <= limit:
                yield _cannot_tell(
                    f"audit: {endpoint.name} could have seen copies of {smallest:.1%} of the patients at best; "
                    f"the study asks for {limit:.1%}"
                )


def coarser_than_default(study: Study) -> tuple[str, ...]:
    """Where the study allows more, or looks less closely, than the default thresholds; one sentence each."""
    allows_more: Sequence[tuple[str, float, float]] = (
        *(
            (f"release.{name}", getattr(study.release, name), ReleaseSettings.model_fields[name].default)
            for name in ("max_auc", "max_auc_site", "max_tpr", "max_detectable_copies")
        ),
        *(
            (f"audit.{name}", getattr(study.audit, name), AuditSettings.model_fields[name].default)
            for name in ("false_positive_rate", "planted_fraction")
        ),
    )
    found = [f"{name} is {value:g}; the default is {usual:g}" for name, value, usual in allows_more if value > usual]
    if study.release.unsafe_bypass:
        found.append("release.unsafe_bypass is set: the gate may be overruled; the default forbids it")
    usual_confidence = AuditSettings.model_fields["confidence"].default
    if study.audit.confidence < usual_confidence:
        found.append(f"audit.confidence is {study.audit.confidence:g}; the default is {usual_confidence:g}")
    return tuple(found)


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
            yield _refuse(f"{site} trained under another mechanism than the plan's")
    used = statement.rounds * plan.steps_per_round
    if steps < used:
        yield _refuse(f"{site} states {steps} training steps, but its replies took {used}")
    if any(isinstance(mechanism, DpSgd) for mechanism in statement.nonmembers.mechanisms):
        yield _refuse(f"{site} trained on patients that it held out")


def _warm_up_objections(site: str, statement: SiteStatement, plan: Plan) -> Iterator[Objection]:
    """The ledger's warm-up must be the plan's, and be there if the coordinator used it."""
    stated = [m for m in statement.members.mechanisms if isinstance(m, GaussianRelease)]
    if any(mechanism != plan.warm_up for mechanism in stated):
        yield _refuse(f"{site} made another warm-up release than the plan's")
    if statement.released and not stated:
        yield _refuse(f"{site} states no warm-up release, but its sums were used")
    if any(isinstance(mechanism, GaussianRelease) for mechanism in statement.nonmembers.mechanisms):
        yield _refuse(f"{site} made a warm-up release of patients that it held out")


def _answer_objections(site: str, statement: SiteStatement, audit: AuditResult | None) -> Iterator[Objection]:
    """What a site answered to the audit must be in its ledger."""
    if audit is None or site not in audit.sites:
        return
    charges = {"members": audit.epsilon_members, "nonmembers": audit.epsilon_nonmembers}
    for cohort, spending in _cohorts(statement):
        paid = math.fsum(m.epsilon for m in spending.mechanisms if isinstance(m, NoisedCounts))
        if paid < charges[cohort] * (1 - 1e-9):
            yield _refuse(
                f"{site} {cohort}: the ledger shows epsilon {paid:g} for noised answers; "
                f"the audit alone cost {charges[cohort]:g}"
            )


def _accounting_objections(who: str, spending: Spending, delta: float) -> Iterator[Objection]:
    if spending.delta != delta:
        yield _refuse(f"{who}: epsilon is stated for delta {spending.delta:g}, the study's is {delta:g}")
    first, second = spending.epsilon, spending.second_opinion
    if math.isinf(first.upper) and math.isinf(second):
        return
    # Renyi is an upper bound, some per cent loose: below the lower end, or far above, one of the two is wrong.
    if not first.lower <= second <= 1.5 * first.upper + 0.5:
        yield _refuse(
            f"{who}: two accountants disagree on epsilon ({first.accountant} {first.lower:.3f} to {first.upper:.3f}, "
            f"rdp {second:.3f})"
        )


def _subject_objections(audit: AuditResult, evidence: ReleaseEvidence) -> Iterator[Objection]:
    """The audit must be of these weights and sites, judged by the study's own thresholds."""
    study = evidence.study
    if audit.endpoints and audit.weights_digest != evidence.generator_digest:
        yield _refuse("the audit examined other weights than those to be released")
    for site in sorted(set(evidence.sites) - set(audit.sites)):
        yield _cannot_tell(f"the audit has no answer of {site}")
    wanted = {
        **{name: getattr(study.release, name) for name in vars(audit.thresholds)},
        "false_positive_rate": study.audit.false_positive_rate,
        "confidence": study.audit.confidence,
    }
    used = {
        **vars(audit.thresholds),
        "false_positive_rate": audit.false_positive_rate,
        "confidence": audit.confidence,
    }
    for name in sorted(name for name in wanted if wanted[name] != used[name]):
        yield _refuse(f"the audit was judged with {name} {used[name]:g}; the study says {wanted[name]:g}")


def _bound_objections(audit: AuditResult, limits: ReleaseSettings) -> Iterator[Objection]:
    """A PASS whose own upper bounds exceed their thresholds contradicts itself."""
    for endpoint in audit.endpoints:
        bounds = [
            (f"{endpoint.name} AUC", endpoint.auc_upper.value, limits.max_auc),
            (f"{endpoint.name} true-positive rate", endpoint.tpr_upper.value, limits.max_tpr),
            *((f"{endpoint.name} AUC of {s.site}", s.upper.value, limits.max_auc_site) for s in endpoint.sites),
        ]
        for name, upper, limit in bounds:
            if not upper <= limit:
                yield _cannot_tell(f"audit: {name} may be as high as {upper:.3f}, above {limit:g}")


def _endpoints(evidence: ReleaseEvidence) -> tuple[EndpointResult, ...]:
    return evidence.audit.endpoints if evidence.audit else ()


def _refuse(text: str) -> Objection:
    return Objection(kind=ObjectionKind.REFUSE, text=text)


def _cannot_tell(text: str) -> Objection:
    return Objection(kind=ObjectionKind.CANNOT_TELL, text=text)
