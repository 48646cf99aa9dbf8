"""The report for machines: canonical JSON (RFC 8785), described by `report.schema.json` beside this file.

Equal facts give equal bytes. Numbers are those of the audit, neither rounded nor cut to their range. Pictures are left
out: they show nothing that was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Literal

from pydantic import TypeAdapter

from common.evidence.canonical import canonical_json
from common.evidence.predicate import DecisionFacts
from common.measure.course import pareto_front
from server.audit import wording
from server.audit.document import Cited, Link
from server.audit.facts import CampaignFacts, NearCopies, ReportFacts, RoundCourse
from server.audit.mapping import Claim, claims
from server.audit.result import AuditResult
from server.audit.threats import carried_out, not_tested
from server.course import Course
from server.federation_epsilon import FederationEpsilon
from server.utility import UtilityResult

SCHEMA_FILE = "report.schema.json"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NAME: Literal["urn:consilium:audit-report:v1"] = "urn:consilium:audit-report:v1"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What was promised and spent: the plan's public numbers, epsilon over sites, every round.

    federation: null when no site stated anything, and when no finite epsilon bounds it; `decision` then says infinite.
    """

    unit: str
    delta: float
    clip_norm: float
    divisor: float
    noise_multiplier: float
    sampling_probability: float
    steps: int
    rounds_planned: int
    rounds: tuple[RoundCourse, ...]
    federation: FederationEpsilon | None
    not_covered: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ScansRecord:
    """The kind of scans, the hold-out and the preparation."""

    modality: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    volumes: int
    holdout: str
    random_holdout: bool
    preparation: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ClaimRecord:
    """A row of a mapping. anchors: in report.html. files: names in `records`."""

    scheme: str
    hazard: str
    answer: str
    anchors: tuple[str, ...]
    files: tuple[str, ...]
    residual: str


@dataclass(frozen=True, kw_only=True)
class CourseRecord:
    """Points in the course of training, which of them no other beats, and which one the rule chose.

    front: their rounds. chosen_round: null when the rule allows no point, and the last round was audited.
    """

    course: Course
    max_auc: float
    max_epsilon: float | None
    front: tuple[int, ...]
    chosen_round: int | None
    reason: str
    free: bool


@dataclass(frozen=True, kw_only=True)
class ReportRecord:
    """The document. made_at: ISO 8601 with offset. decision, training, utility: null without a campaign.
    near_copies: null with one; it names files. course: left out for a study that did not follow it.
    """

    schema: Literal["urn:consilium:audit-report:v1"]
    title: str
    purpose: str
    made_at: str
    reference: str
    word: str
    sentence: str
    reasons: tuple[str, ...]
    simulated: bool
    seed: int | None
    scans: ScansRecord
    decision_id: str | None
    decision: DecisionFacts | None
    training: TrainingRecord | None
    utility: UtilityResult | None
    audit_result_digest: str | None
    audit: AuditResult | None
    near_copies: NearCopies | None
    course: CourseRecord | None
    attacks: tuple[str, ...]
    not_tested: tuple[str, ...]
    claims: tuple[ClaimRecord, ...]
    digests: Mapping[str, str]
    records: Mapping[str, str]
    versions: Mapping[str, str]


_ADAPTER = TypeAdapter(ReportRecord)


def report_json(facts: ReportFacts) -> bytes:
    """The report as canonical JSON. Raises ValueError when a number in it is not finite."""
    body = _ADAPTER.dump_python(_record(facts), mode="json")
    if body["course"] is None:
        del body["course"]  # reports from before it keep their bytes
    return canonical_json(body)


def schema_text() -> str:
    """What `report.schema.json` must say: the JSON Schema of `report_json`, derived from the types above.

    After a change of `AuditResult` or another type: write this text to the file, in the same commit.
    """
    schema: dict[str, Any] = {"$schema": _DIALECT, "$id": _NAME, **_ADAPTER.json_schema(mode="serialization")}
    schema["required"].remove("course")
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def shipped_schema() -> str:
    """The schema as it is installed."""
    return files("server.audit").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")


def _record(facts: ReportFacts) -> ReportRecord:
    headline, campaign, audit = wording.headline(facts), facts.campaign, facts.audit
    scans = asdict(facts.scans)
    del scans["attacks"]  # in `attacks`, with the endpoints
    return ReportRecord(
        schema=_NAME,
        title=facts.title,
        purpose=facts.purpose,
        made_at=facts.made_at.isoformat(),
        reference=facts.reference,
        word=headline.word,
        sentence=headline.sentence,
        reasons=wording.reasons(facts),
        simulated=facts.simulated,
        seed=campaign.seed if campaign else None,
        scans=ScansRecord(**scans),
        decision_id=campaign.decision.id if campaign else None,
        decision=campaign.decision if campaign else None,
        training=_training(campaign) if campaign else None,
        utility=campaign.utility if campaign else None,
        audit_result_digest=audit.digest if audit else None,
        audit=audit,
        near_copies=facts.near_copies,
        course=_course(campaign) if campaign else None,
        attacks=carried_out(facts),
        not_tested=not_tested(facts),
        claims=tuple(map(_claim, claims(facts))),
        digests=facts.digests,
        records=facts.records,
        versions=facts.versions,
    )


def _training(campaign: CampaignFacts) -> TrainingRecord:
    plan = campaign.plan
    return TrainingRecord(
        unit=plan.mechanism.unit.value,
        delta=plan.delta,
        clip_norm=plan.clip_norm,
        divisor=plan.divisor,
        noise_multiplier=plan.mechanism.noise_multiplier,
        sampling_probability=plan.mechanism.sampling_probability,
        steps=plan.mechanism.steps,
        rounds_planned=plan.rounds,
        rounds=campaign.rounds,
        federation=campaign.federation if _is_finite(campaign.federation) else None,
        not_covered=wording.not_covered(campaign),
    )


def _is_finite(federation: FederationEpsilon | None) -> bool:
    return federation is not None and math.isfinite(federation.everywhere.upper)


def _course(campaign: CampaignFacts) -> CourseRecord | None:
    course, chosen = campaign.course, campaign.chosen
    if course is None or chosen is None:
        return None
    return CourseRecord(
        course=course,
        max_auc=chosen.rule.max_auc,
        max_epsilon=chosen.rule.max_epsilon,
        front=tuple(course.points[i].round for i in pareto_front(course.points)),
        chosen_round=None if chosen.row is None else chosen.row.round,
        reason=chosen.reason,
        free=chosen.free,
    )


def _claim(claim: Claim) -> ClaimRecord:
    return ClaimRecord(
        scheme=claim.scheme,
        hazard=claim.hazard,
        answer=claim.answer,
        anchors=tuple(link.anchor for link in claim.evidence if isinstance(link, Link)),
        files=tuple(link.name for link in claim.evidence if isinstance(link, Cited)),
        residual=claim.residual,
    )
