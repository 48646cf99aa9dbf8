"""What a release's signature says: the decision and the facts it rests on, as frozen values."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from common.errors import VerificationFailed
from common.evidence.canonical import Json, canonical_json, sha256_hex

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:consilium:release-decision:v2"

# Kinds of evidence records that a verifier reads.
ENROLMENT_RECORD = "enrolment"
ROUND_RECORD = "round"
ROUND_NOT_HELD_RECORD = "round-not-held"
PLAN_RECORD = "audit-plan"
QUESTION_RECORD = "audit-question"
ANSWERS_RECORD = "audit-answers"
RESULT_RECORD = "audit-result"
STATEMENTS_RECORD = "statements"
DECISION_RECORD = "decision"  # every bundle's chain ends with it
BYPASS_RECORD = "unsafe-bypass"  # unless the decision was overruled: then with this, right after it

# A sentence of a person that is printed again: one line, nothing that steers a terminal.
Reason = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]{10,500}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Outcome(StrEnum):
    """What the gate decided. Only RELEASE releases anything."""

    RELEASE = "RELEASE"
    REJECT = "REJECT"
    INCONCLUSIVE = "INCONCLUSIVE"


class Fact(BaseModel):
    """Frozen; unknown fields and wrong types are refused; NaN and infinities cannot be signed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CohortEpsilon(Fact):
    """What one cohort of a site has spent on this study, from the site's own ledger, everything included.

    epsilon: reported value with the accountant's error interval lower..upper; "infinite" means no guarantee.
    second_opinion: an upper bound on the same quantity by another method (RDP).
    """

    epsilon: float | Literal["infinite"]
    lower: float | Literal["infinite"]
    upper: float | Literal["infinite"]
    delta: float
    accountant: str
    second_opinion: float | Literal["infinite"]


class SiteFacts(Fact):
    """What one site stated. members: patients trained on; nonmembers: patients held out for audit and utility.

    receipt_key: Ed25519 public key, hex, that the site enrolled with. receipt: SHA-256 of its receipt in the bundle;
    None when it gave none, or none that holds.
    """

    members: CohortEpsilon
    nonmembers: CohortEpsilon
    rounds: int
    holdout_commitment: str
    policy_digest: str
    code_digest: str
    ledger_head: str
    receipt_key: Digest | None = None
    receipt: Digest | None = None


class AuditBound(Fact):
    """One number of the audit: estimate, one-sided bounds, and the threshold where the study sets one."""

    name: str
    estimate: float | None
    lower: float | None
    upper: float | None
    threshold: float | None = None


class AuditFacts(Fact):
    """The audit in short; its whole result has the digest `result_digest`.

    smallest_detectable_copies: share of copied patients that it would have found; None when nothing was measured.
    """

    verdict: Literal["pass", "fail", "inconclusive"]
    reasons: tuple[str, ...]
    bounds: tuple[AuditBound, ...]
    confidence: float
    smallest_detectable_copies: float | None
    controls_caught: bool
    plan_digest: Digest
    result_digest: Digest


class DecisionFacts(Fact):
    """Everything that was decided on. Known before the report is written, so that the report can carry its id.

    coarser: where the study allows more than the default thresholds, in words; empty when nowhere.
    generator_digest, candidates_digest: the very weights and volumes that were audited.
    """

    outcome: Outcome = Field(strict=False)
    reasons: tuple[str, ...]
    policies: tuple[str, ...]
    study: str
    study_digest: Digest
    simulated: bool
    coarser: tuple[str, ...]
    sites: dict[SiteName, SiteFacts]
    audit: AuditFacts | None
    generator_digest: Digest
    candidates_digest: Digest

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON of all fields."""
        return sha256_hex(canonical_json(self.model_dump(mode="json")))


class Bypass(Fact):
    """Somebody overruled the gate. reason: their words. refusal: SHA-256 of the attestation of the signed refusal."""

    reason: Reason
    refusal: Digest


class Predicate(Fact):
    """What is signed, besides the digests of all files.

    bypass: None unless volumes were handed out although the decision is a refusal; then nothing here is a release.
    evidence_head: digest of the chain's last record. expires: None for a refusal, which does not expire.
    """

    schema_version: Literal[2] = 2
    decision: DecisionFacts
    decision_id: Digest
    bypass: Bypass | None = None
    evidence_head: Digest
    code_version: str
    issued: AwareDatetime = Field(strict=False)
    expires: AwareDatetime | None = Field(default=None, strict=False)

    def json_value(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self.model_dump(mode="json")


class Subject(Fact):
    """One file of the bundle: its path relative to the bundle, with forward slashes."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    digest: dict[Literal["sha256"], Digest]


class Statement(Fact):
    """An in-toto Statement v1 about a bundle."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[tuple[Subject, ...], Field(min_length=1)]
    predicate_type: Literal["urn:consilium:release-decision:v2"] = Field(alias="predicateType")
    predicate: Predicate


def statement_payload(digests: dict[str, str], predicate: Predicate) -> bytes:
    """Canonical JSON of the statement that the files in `digests` (name -> SHA-256) belong to `predicate`."""
    subjects: list[Json] = [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(digests)]
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": subjects,
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate.json_value(),
        }
    )


def read_statement(payload: bytes, name: str) -> Statement:
    """The statement in a payload. name: the file, for the VerificationFailed that is raised when it is not one."""
    try:
        return Statement.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "statement"
        raise VerificationFailed(f"{name}: is not a release statement ({where}: {first['msg']})") from error


def utc_text(moment: datetime) -> str:
    """A moment for people: 2026-11-20 14:05 UTC."""
    return moment.strftime("%Y-%m-%d %H:%M UTC")
