"""The release gate: from evidence and policies to a decision. Pure, and closed unless everything holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.evidence.predicate import AuditBound, AuditFacts, CohortEpsilon, DecisionFacts, Outcome, SiteFacts
from server.audit.result import AuditResult, EndpointResult, Verdict
from server.release.evidence import ObjectionKind, Policy, ReleaseEvidence, SiteStatement, Spending
from server.release.policies import coarser_than_default


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, with everything it rests on. reasons: empty for a RELEASE."""

    facts: DecisionFacts

    @property
    def outcome(self) -> Outcome:
        """RELEASE, REJECT or INCONCLUSIVE."""
        return self.facts.outcome

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every objection, refusals first."""
        return self.facts.reasons

    @property
    def id(self) -> str:
        """SHA-256 of the facts; card, report, evidence and signature carry it."""
        return self.facts.id


def decide(evidence: ReleaseEvidence, policies: Sequence[Policy]) -> Decision:
    """RELEASE only when the audit passed and no policy objects. No policies is a refusal.

    A refusing objection, or a failed audit, makes REJECT; else anything that could not be told makes INCONCLUSIVE.
    """
    objections = [objection for policy in policies for objection in policy.objections(evidence)]
    refused = [o.text for o in objections if o.kind is ObjectionKind.REFUSE]
    unclear = [o.text for o in objections if o.kind is ObjectionKind.CANNOT_TELL]
    verdict = evidence.audit.verdict if evidence.audit else None
    if not policies:
        refused.append("no release policy is configured")
    # The verdict is read here too: a list of policies without `AuditPassed` must not open the gate.
    if verdict is Verdict.FAIL and not refused:
        refused.append("the audit failed")
    if verdict is not Verdict.PASS and not refused and not unclear:
        unclear.append("the audit did not pass")
    if refused:
        outcome = Outcome.REJECT
    elif unclear:
        outcome = Outcome.INCONCLUSIVE
    else:
        outcome = Outcome.RELEASE
    names = tuple(policy.name for policy in policies)
    return Decision(facts=_facts(evidence, outcome, tuple(refused + unclear), names))


def _facts(
    evidence: ReleaseEvidence, outcome: Outcome, reasons: tuple[str, ...], policies: tuple[str, ...]
) -> DecisionFacts:
    return DecisionFacts(
        outcome=outcome,
        reasons=reasons,
        policies=policies,
        study=evidence.study.study,
        study_digest=evidence.study_digest,
        simulated=evidence.simulated or any(s.simulated for s in evidence.statements.values()),
        coarser=coarser_than_default(evidence.study),
        sites={site: _site(statement) for site, statement in sorted(evidence.statements.items())},
        audit=_audit(evidence.audit) if evidence.audit else None,
        generator_digest=evidence.generator_digest,
        candidates_digest=evidence.candidates_digest,
    )


def _site(statement: SiteStatement) -> SiteFacts:
    return SiteFacts(
        members=_cohort(statement.members),
        nonmembers=_cohort(statement.nonmembers),
        rounds=statement.rounds,
        holdout_commitment=statement.holdout_commitment,
        policy_digest=statement.policy_digest,
        code_digest=statement.code_digest,
        ledger_head=statement.ledger_head,
        receipt_key=statement.receipt.key if statement.receipt else None,
        receipt=statement.receipt.digest if statement.receipt else None,
    )


def _cohort(spending: Spending) -> CohortEpsilon:
    epsilon = spending.epsilon
    return CohortEpsilon(
        epsilon=_number(epsilon.value),
        lower=_number(epsilon.lower),
        upper=_number(epsilon.upper),
        delta=epsilon.delta,
        accountant=epsilon.accountant,
        second_opinion=_number(spending.second_opinion),
    )


def _audit(audit: AuditResult) -> AuditFacts:
    return AuditFacts(
        verdict=audit.verdict.value,
        reasons=audit.reasons,
        bounds=tuple(bound for endpoint in audit.endpoints for bound in _bounds(endpoint, audit)),
        confidence=audit.confidence,
        smallest_detectable_copies=audit.smallest_detectable_copies,
        controls_caught=audit.controls_caught,
        plan_digest=audit.plan_digest,
        result_digest=audit.digest,
    )


def _bounds(endpoint: EndpointResult, audit: AuditResult) -> tuple[AuditBound, ...]:
    limits, rate = audit.thresholds, audit.false_positive_rate
    return (
        AuditBound(
            name=f"{endpoint.name}: AUC",
            estimate=endpoint.auc.estimate,
            lower=endpoint.auc_lower.value,
            upper=endpoint.auc_upper.value,
            threshold=limits.max_auc,
        ),
        AuditBound(
            name=f"{endpoint.name}: true-positive rate at false-positive rate {rate:g}",
            estimate=endpoint.tpr.estimate,
            lower=endpoint.tpr_lower.value,
            upper=endpoint.tpr_upper.value,
            threshold=limits.max_tpr,
        ),
        *(
            AuditBound(
                name=f"{endpoint.name}: AUC of {site.site}",
                estimate=site.auc.estimate,
                lower=site.lower.value,
                upper=site.upper.value,
                threshold=limits.max_auc_site,
            )
            for site in endpoint.sites
        ),
        AuditBound(
            name=f"{endpoint.name}: share of members found as copies",
            estimate=None,
            lower=endpoint.copies_lower.value,
            upper=None,
        ),
    )


def _number(value: float) -> float | Literal["infinite"]:
    """JSON has no infinity."""
    return "infinite" if math.isinf(value) else value
