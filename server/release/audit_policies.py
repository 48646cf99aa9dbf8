"""What the audit must have shown before anything is released: G0 to G7 of docs/decisions/0015, a policy each.

All must hold together, so that upper bounds need no correction for multiplicity (intersection-union). The verdict has
weighed the same numbers before; the policies read them again, so that a verdict and its evidence cannot part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from common.measure.audit_plan import Endpoint
from common.settings.study import Question, ReleaseSettings
from server.audit.result import AuditResult, EndpointResult, MechanismAudit, MechanismVerdict, Verdict
from server.release.evidence import Objection, ReleaseEvidence


@dataclass(frozen=True)
class AuditPassed:
    """The audit of these very weights, under the study's own thresholds, passed."""

    name: str = "audit-passed"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """FAIL refuses; INCONCLUSIVE, or no audit, cannot tell; a PASS is read against its own bounds."""
        audit = evidence.audit
        if audit is None:
            yield Objection.cannot_tell("there was no audit")
            return
        yield from _subject_objections(audit, evidence)
        match audit.verdict:
            case Verdict.FAIL:
                yield from (Objection.refuse(f"audit: {reason}") for reason in audit.reasons)
            case Verdict.INCONCLUSIVE:
                yield from (Objection.cannot_tell(f"audit: {reason}") for reason in audit.reasons)
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
                yield Objection.cannot_tell(f"audit: {endpoint.name} missed the copies that were planted for it")
            if not endpoint.null.passed:
                yield Objection.cannot_tell(
                    f"audit: {endpoint.name} tells members from other members; it shows nothing"
                )


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
                yield Objection.cannot_tell(
                    f"audit: {endpoint.name} could have seen copies of {smallest:.1%} of the patients at best; "
                    f"the study asks for {limit:.1%}"
                )


@dataclass(frozen=True)
class GroupsComparable:
    """G0: members and held-out differ in nothing but membership, as far as a score without the generator sees."""

    name: str = "groups-comparable"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """A difference, or no answer where the study asks for one."""
        audit = evidence.audit
        if audit is None or not audit.endpoints:
            return
        if audit.blind is None:
            if Question.BLIND in evidence.study.audit.questions:
                yield Objection.cannot_tell("audit: the blind baseline was not measured")
            return
        limit = evidence.study.release.max_blind_auc
        if not (1 - limit < audit.blind.auc.low and audit.blind.auc.high < limit):
            yield Objection.cannot_tell(
                f"audit: members and held-out differ without the generator (AUC {audit.blind.auc.low:.3f} to "
                f"{audit.blind.auc.high:.3f}; the study tolerates {1 - limit:.2f} to {limit:.2f})"
            )


@dataclass(frozen=True)
class NearCopiesRare:
    """G5: few enough members stand out as copies, by the score that was made to see copies."""

    name: str = "near-copies-rare"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Copies shown, or not ruled out up to the tolerated share."""
        limit = evidence.study.release.max_copied_share
        for endpoint in _endpoints(evidence):
            if endpoint.copies_lower.value > 0:
                yield Objection.refuse(
                    f"audit: by {endpoint.name} at least {endpoint.copies_lower.value:.3f} of members were copied"
                )
            elif endpoint.name is Endpoint.NEAR_COPY and not endpoint.copies_upper.value <= limit:
                yield Objection.cannot_tell(
                    f"audit: up to {endpoint.copies_upper.value:.3f} of members may have been copied, above {limit:g}"
                )


@dataclass(frozen=True)
class MechanismConsistent:
    """G6: what canaries saw of training does not contradict the epsilon that it claims."""

    name: str = "mechanism-consistent"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """A violation refuses; no answer, or canaries not heard, cannot tell; that they are too few is no doubt."""
        audit = evidence.audit
        if audit is None:
            return
        if audit.mechanism is None:
            if evidence.study.audit.canaries and evidence.study.privacy.target_epsilon is not None:
                yield Objection.cannot_tell("the study has canaries, and there was no audit of the mechanism")
        elif audit.mechanism.verdict is MechanismVerdict.VIOLATION:
            yield from (Objection.refuse(f"mechanism audit: {reason}") for reason in audit.mechanism.reasons)
        elif audit.mechanism.verdict is MechanismVerdict.UNINFORMATIVE and not _too_few_canaries(audit.mechanism):
            yield from (Objection.cannot_tell(f"mechanism audit: {reason}") for reason in audit.mechanism.reasons)


@dataclass(frozen=True)
class InferenceWithin:
    """G7: an attribute is not guessed better for members than for patients held out."""

    name: str = "inference-within"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """A lift above the limit, or not shown to be below it, or not measured where the study asks."""
        audit, limit = evidence.audit, evidence.study.release.max_inference_lift
        if audit is None or not audit.endpoints:
            return
        if audit.inference is None:
            if Question.LABEL_SIZE in evidence.study.audit.questions:
                yield Objection.cannot_tell("audit: attribute inference was not measured")
        elif not audit.inference.upper.value <= limit:
            yield Objection.cannot_tell(
                f"audit: an attribute may be guessed better for members by {audit.inference.upper.value:.3f}, "
                f"above {limit:g}"
            )


def _too_few_canaries(mechanism: MechanismAudit) -> bool:
    """Whether not even perfect guesses could have refuted the claim."""
    return bool(mechanism.bounds) and max(bound.ceiling for bound in mechanism.bounds) < mechanism.claimed_epsilon


def _subject_objections(audit: AuditResult, evidence: ReleaseEvidence) -> Iterator[Objection]:
    """The audit must be of these weights and sites, judged by the study's own thresholds."""
    study = evidence.study
    if audit.endpoints and audit.weights_digest != evidence.generator_digest:
        yield Objection.refuse("the audit examined other weights than those to be released")
    for site in sorted(set(evidence.sites) - set(audit.sites)):
        yield Objection.cannot_tell(f"the audit has no answer of {site}")
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
        yield Objection.refuse(f"the audit was judged with {name} {used[name]:g}; the study says {wanted[name]:g}")


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
                yield Objection.cannot_tell(f"audit: {name} may be as high as {upper:.3f}, above {limit:g}")


def _endpoints(evidence: ReleaseEvidence) -> tuple[EndpointResult, ...]:
    return evidence.audit.endpoints if evidence.audit else ()
