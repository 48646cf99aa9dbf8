"""Whether an audit was conducted as it should have been, from what it left: offline, without a site and without trust.

(1) a bundle verifies as such; of a run, the evidence chain holds
(2) the plan was signed by the auditor's key, and signature and digest were in the chain before any round and any answer
(3) the stored answers are those that the chain recorded, to this plan and to the generator that was asked about
(4) judged again, they give the recorded result, which is the one that the decision names
(5) each answer that was used is named in the receipt that its site signed
(6) each site's epsilon follows from the mechanisms in its receipt
(7) the report carries the decision
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from common.errors import IntegrityError, UsageError, VerificationFailed
from common.evidence.bundle_receipts import receipt_name
from common.evidence.canonical import Json, canonical_json, sha256_hex
from common.evidence.chain import Record, read_chain
from common.evidence.predicate import (
    ANSWERS_RECORD,
    DECISION_RECORD,
    ENROLMENT_RECORD,
    PLAN_RECORD,
    QUESTION_RECORD,
    RESULT_RECORD,
    ROUND_RECORD,
    CohortEpsilon,
    DecisionFacts,
)
from common.evidence.receipt import read_receipt
from common.evidence.signing import Purpose, open_json, read_public_key_hex
from common.evidence.verification import DECISION, EVIDENCE, REPORT, verify_bundle
from common.privacy.accounting import epsilon
from common.privacy.mechanism_json import parse_mechanism
from common.protocol import codec
from common.settings.load import parse_study
from common.settings.study import Study
from server.audit.result import AuditResult
from server.audit_stage import Answers, AuditFolder, rejudge
from server.release.bundle import AUDIT, STUDY
from server.run_folder import RunFolder, read_decision

_TOLERANCE: Final = 1e-6  # of an epsilon that another machine computed from the same mechanisms


@dataclass(frozen=True, kw_only=True)
class AuditVerified:
    """An audit that holds. findings: what was checked, in words."""

    result: AuditResult
    decision: DecisionFacts
    findings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Audit:
    """Where the parts of one audit lie. bundle: the signed outcome, where the receipts are."""

    study: Study
    records: Sequence[Record]
    folder: AuditFolder
    report: Path
    bundle: Path
    decision: DecisionFacts


def verify_audit(path: Path, *, trusted_key: bytes | None, now: datetime) -> AuditVerified:
    """Steps (1) to (7). path: a finished run, its `audit` folder, a release or a signed refusal.

    trusted_key: PEM of the auditor's public key; now: aware. Raises UsageError when there is nothing to verify,
    VerificationFailed naming what does not hold.
    """
    audit = _opened(path, trusted_key, now)  # (1)
    missing = [file for file in _needed(audit.folder) if not file.is_file()]
    if missing:
        raise VerificationFailed(
            f"{audit.report.name} is a report without its data: {missing[0].name} is missing from {audit.folder.path}. "
            "Nothing in it can be checked; ask whoever gave it to you for the whole folder."
        )
    try:
        plan_digest = _check_plan(audit)  # (2)
        answers = _check_answers(audit, plan_digest)  # (3)
        result = _check_result(audit)  # (4)
    except IntegrityError as damage:
        raise VerificationFailed(str(damage)) from damage
    receipts = _check_receipts(audit, answers)  # (5) (6)
    if audit.decision.id not in audit.report.read_text(encoding="utf-8"):  # (7)
        raise VerificationFailed(f"{audit.report.name}: does not carry the decision {audit.decision.id[:16]}...")
    return AuditVerified(
        result=result,
        decision=audit.decision,
        findings=(
            "the plan was signed before any round and any answer",
            f"answers of {len(answers.replies)} sites, as the evidence chain recorded them",
            "judged again they give the recorded result, which the decision names",
            f"receipts of {receipts} sites name the answers that were used, and their epsilon follows from them",
            "the report carries the decision",
        ),
    )


def _needed(folder: AuditFolder) -> Iterator[Path]:
    yield from (folder.plan_file, folder.sealed_plan_file, folder.answers_file, folder.result_file)


def _opened(path: Path, trusted_key: bytes | None, now: datetime) -> _Audit:
    run = RunFolder(path=path if (path / "run.json").is_file() else path.parent)
    if (path / DECISION).is_file():
        bundle, folder, report = path, AuditFolder(path=path / AUDIT), path / REPORT
    elif run.facts_file.is_file() and path in (run.path, run.audit):
        bundle, folder, report = run.release, AuditFolder(path=run.audit), run.report
        if not (bundle / DECISION).is_file():
            raise UsageError(f"the run in {run.path} has no decision yet; nothing was verified. Resume the run.")
    else:
        raise UsageError(f"{path} is neither a run, its audit nor a release; nothing was verified.")
    verify_bundle(bundle, trusted_key=trusted_key, now=now)
    signed = (bundle / EVIDENCE).read_bytes()
    if bundle != path and not run.evidence.read_bytes().startswith(signed):
        raise VerificationFailed(f"{run.evidence.name}: does not begin with the records that were signed")
    return _Audit(
        study=parse_study((bundle / STUDY).read_text(encoding="utf-8")),
        records=read_chain(signed, EVIDENCE),
        folder=folder,
        report=report,
        bundle=bundle,
        decision=read_decision(bundle),
    )


def _check_plan(audit: _Audit) -> str:
    """Step (2); the plan's digest."""
    plan = audit.folder.plan()
    assert plan is not None  # noqa: S101  # for mypy: the file was found
    sealed, name = audit.folder.sealed_plan_file.read_bytes(), audit.folder.sealed_plan_file.name
    fixed = _first(audit.records, PLAN_RECORD, sealed=sha256_hex(sealed))
    if fixed is None or fixed.body.get("plan_digest") != plan.digest:
        raise VerificationFailed(f"{name}: the evidence chain does not record this plan and its signature")
    too_early = _first(audit.records, ROUND_RECORD), _first(audit.records, ANSWERS_RECORD)
    if any(other is not None and other.index < fixed.index for other in too_early):
        raise VerificationFailed(f"{name}: was put on record after the sites had begun to answer")
    enrolment = _first(audit.records, ENROLMENT_RECORD)
    key = read_public_key_hex(str(enrolment.body.get("coordinator_key")) if enrolment else "", "the auditor's key")
    body = open_json(sealed, name, key=key, purpose=Purpose.AUDIT_PLAN)
    if sha256_hex(canonical_json(body)) != plan.digest:
        raise VerificationFailed(f"{name}: is not the plan in {audit.folder.plan_file.name}")
    return plan.digest


def _check_answers(audit: _Audit, plan_digest: str) -> Answers:
    """Step (3)."""
    answers, name = audit.folder.answers(), audit.folder.answers_file.name
    assert answers is not None  # noqa: S101  # for mypy: the file was found
    if _last(audit.records, ANSWERS_RECORD).get("sha256") != sha256_hex(audit.folder.answers_file.read_bytes()):
        raise VerificationFailed(f"{name}: is not what the evidence chain recorded; answers were changed")
    asked = _last(audit.records, QUESTION_RECORD)
    if (asked.get("plan_digest"), asked.get("weights_digest")) != (plan_digest, audit.decision.generator_digest):
        raise VerificationFailed("the evidence chain records a question by another plan, or about another generator")
    for site, reply in answers.replies.items():
        if (reply.audit_plan_digest, reply.weights_digest) != (plan_digest, audit.decision.generator_digest):
            raise VerificationFailed(f"{name}: the answer of {site} is to another question")
    return answers


def _check_result(audit: _Audit) -> AuditResult:
    """Step (4)."""
    result, as_recorded = rejudge(audit.study, audit.folder)
    name = audit.folder.result_file.name
    if not as_recorded:
        raise VerificationFailed(f"{name}: the stored answers, judged again, do not give this result")
    if _last(audit.records, RESULT_RECORD).get("result_digest") != result.digest:
        raise VerificationFailed(f"{name}: is not the result that the evidence chain recorded")
    named = audit.decision.audit
    if named is None or (named.result_digest, named.verdict) != (result.digest, result.verdict.value):
        raise VerificationFailed(f"{name}: is not the result that the decision names")
    if _last(audit.records, DECISION_RECORD).get("decision_id") != audit.decision.id:
        raise VerificationFailed("the evidence chain ends with another decision")
    return result


def _check_receipts(audit: _Audit, answers: Answers) -> int:
    """Steps (5) and (6); how many there are. `verify_bundle` has checked their signatures."""
    named = {site: facts for site, facts in audit.decision.sites.items() if facts.receipt is not None}
    for site, facts in named.items():
        name = receipt_name(site)
        receipt = read_receipt((audit.bundle / name).read_bytes(), name)
        reply = answers.replies.get(site)
        if reply is not None and codec.digest(reply) not in {a.answer for a in receipt.answers if a.kind == "score"}:
            raise VerificationFailed(f"{name}: does not name the audit answer that was used; it is not the site's own")
        for cohort, mechanisms in ((facts.members, receipt.members), (facts.nonmembers, receipt.nonmembers)):
            _check_epsilon(name, cohort, mechanisms)
    return len(named)


def _check_epsilon(name: str, stated: CohortEpsilon, mechanisms: Sequence[str]) -> None:
    computed = epsilon([parse_mechanism(text) for text in mechanisms], stated.delta).upper
    told = math.inf if stated.upper == "infinite" else stated.upper
    if computed != told and not math.isclose(computed, told, rel_tol=_TOLERANCE):
        raise VerificationFailed(f"{name}: its mechanisms cost epsilon {computed:.3f}, the decision says {told:.3f}")


def _first(records: Sequence[Record], kind: str, **body: Json) -> Record | None:
    """The first record of a kind that holds all of `body`."""
    found = (r for r in records if r.kind == kind and all(r.body.get(name) == value for name, value in body.items()))
    return next(found, None)


def _last(records: Sequence[Record], kind: str) -> Mapping[str, Json]:
    return next((record.body for record in reversed(records) if record.kind == kind), {})
