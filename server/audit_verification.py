"""Whether an audit was conducted as it should have been, from what it left: offline, without a site and without trust.

(1) a bundle verifies as such; of a run, the evidence chain holds
(2) the plan is the one that the study prescribes for the sites that enrolled; it was signed by the auditor's key, and
    signature and digest were in the chain before any warm-up, any round, any canary and any answer
(3) the stored answers, those about canaries too, are those that the chain recorded: to this plan, to the generator
    that was asked about, and of the sites that the decision names
(4) judged again, they give the recorded result, which is the one that the decision names
(5) each answer that was used is named in the receipt that its site signed; for a release each has one
(6) each site's epsilon follows from the mechanisms in its receipt
(7) the signed report carries the decision; the copy beside a run is not signed, and is held to that only
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
    Outcome,
)
from common.evidence.receipt import read_receipt
from common.evidence.signing import Purpose, open_json, read_public_key_hex
from common.evidence.verification import DECISION, EVIDENCE, REPORT, STUDY, verify_bundle
from common.measure.audit_plan import make_plan
from common.privacy.accounting import epsilon
from common.privacy.mechanism_json import parse_mechanism
from common.protocol import codec
from common.settings.load import parse_study, study_digest
from common.settings.study import Study
from server.audit.result import AuditResult
from server.audit_stage import Answers, AuditFolder, rejudge
from server.enrolment import enrolment_from
from server.mechanism_stage import CANARIES_FILE, CANARIES_RECORD
from server.release.bundle import AUDIT
from server.run_folder import RunFolder, read_decision
from server.warm_up import WARM_UP_RECORD

_ASKED: Final = (WARM_UP_RECORD, ROUND_RECORD, CANARIES_RECORD, ANSWERS_RECORD)  # sites have answered something
_TOLERANCE: Final = 1e-6  # of an epsilon that another machine computed from the same mechanisms


@dataclass(frozen=True, kw_only=True)
class AuditVerified:
    """An audit that holds. findings: what was checked, in words."""

    result: AuditResult
    decision: DecisionFacts
    findings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Audit:
    """Where the parts of one audit lie. bundle: the signed outcome, where receipts and the signed report are.

    report: the one that lies beside the audit, of a run an unsigned copy.
    """

    study: Study
    records: Sequence[Record]
    folder: AuditFolder
    report: Path
    bundle: Path
    decision: DecisionFacts

    @property
    def signed_report(self) -> Path:
        """The report under the auditor's signature."""
        return self.bundle / REPORT


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
    report = _check_report(audit)  # (7)
    return AuditVerified(
        result=result,
        decision=audit.decision,
        findings=(
            "the plan is the study's, and was signed before the sites answered anything",
            f"answers of {len(answers.replies)} sites, as the evidence chain recorded them",
            "judged again they give the recorded result, which the decision names",
            f"receipts of {receipts} sites name the answers that were used, and their epsilon follows from them",
            report,
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
    if not (bundle / STUDY).is_file():
        raise VerificationFailed(f"{STUDY}: is missing, and with it what the audit has to be judged by")
    signed = (bundle / EVIDENCE).read_bytes()
    if bundle != path and not run.evidence.read_bytes().startswith(signed):
        raise VerificationFailed(f"{run.evidence.name}: does not begin with the records that were signed")
    study, decision = parse_study((bundle / STUDY).read_text(encoding="utf-8")), read_decision(bundle)
    if study_digest(study) != decision.study_digest:
        raise VerificationFailed(
            f"{STUDY}: this version of Consilium does not read it as the study that the decision is about; "
            f"nothing was judged. Verify with the version that wrote it, which {DECISION} names."
        )
    return _Audit(
        study=study,
        records=read_chain(signed, EVIDENCE),
        folder=folder,
        report=report,
        bundle=bundle,
        decision=decision,
    )


def _check_plan(audit: _Audit) -> str:
    """Step (2); the plan's digest."""
    plan = audit.folder.plan()
    assert plan is not None  # noqa: S101  # for mypy: the file was found
    sealed, name = audit.folder.sealed_plan_file.read_bytes(), audit.folder.sealed_plan_file.name
    fixed = _first(audit.records, PLAN_RECORD, sealed=sha256_hex(sealed))
    if fixed is None or fixed.body.get("plan_digest") != plan.digest:
        raise VerificationFailed(f"{name}: the evidence chain does not record this plan and its signature")
    if any(record.kind in _ASKED and record.index < fixed.index for record in audit.records):
        raise VerificationFailed(f"{name}: was put on record after the sites had begun to answer")
    enrolments = [record for record in audit.records if record.kind == ENROLMENT_RECORD]
    if len(enrolments) != 1:
        raise VerificationFailed(f"{EVIDENCE}: records {len(enrolments)} enrolments, where a run has one")
    if plan != make_plan(audit.study, enrolment_from(enrolments[0], audit.decision.study_digest).names):
        raise VerificationFailed(
            f"{audit.folder.plan_file.name}: is not the plan that the study prescribes for the sites that enrolled, "
            "or was made by another version of Consilium"
        )
    key = read_public_key_hex(str(enrolments[0].body.get("coordinator_key")), "the auditor's key")
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
    named, asked_sites = set(audit.decision.sites), set(answers.participants)
    # A refusal may be because a site made no statement; then the decision cannot name it.
    strangers = named ^ asked_sites if audit.decision.outcome is Outcome.RELEASE else named - asked_sites
    if strangers:
        raise VerificationFailed(f"{name}: the audit and the decision are not about the same sites: {min(strangers)}")
    _check_canaries(audit)
    return answers


def _check_canaries(audit: _Audit) -> None:
    """Step (3) for what the sites guessed about canaries, where there were any."""
    file = audit.folder.path / CANARIES_FILE
    recorded = _last(audit.records, CANARIES_RECORD)
    if recorded and not file.is_file():
        raise VerificationFailed(f"{file.name}: is missing, and with it what the evidence chain recorded of canaries")
    if file.is_file() and recorded.get("sha256") != sha256_hex(file.read_bytes()):
        raise VerificationFailed(f"{file.name}: is not what the evidence chain recorded; guesses were changed")


def _check_result(audit: _Audit) -> AuditResult:
    """Step (4)."""
    result, as_recorded = rejudge(audit.study, audit.folder)
    name = audit.folder.result_file.name
    if not as_recorded:
        raise VerificationFailed(f"{name}: the stored answers, judged again, do not give this result")
    digest = sha256_hex(audit.folder.result_file.read_bytes())
    if _last(audit.records, RESULT_RECORD).get("result_digest") != digest:
        raise VerificationFailed(f"{name}: is not the result that the evidence chain recorded")
    named = audit.decision.audit
    if named is None or (named.result_digest, named.verdict) != (digest, result.verdict.value):
        raise VerificationFailed(f"{name}: is not the result that the decision names")
    if _last(audit.records, DECISION_RECORD).get("decision_id") != audit.decision.id:
        raise VerificationFailed("the evidence chain ends with another decision")
    return result


def _check_receipts(audit: _Audit, answers: Answers) -> int:
    """Steps (5) and (6); how many there are.

    `verify_bundle` has checked their signatures, and that a release has one of every site that its decision names;
    step (3), that these are the sites whose answers were used.
    """
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


def _check_report(audit: _Audit) -> str:
    """Step (7); what was found, in words."""
    for report in (audit.signed_report, audit.report):
        if audit.decision.id not in report.read_text(encoding="utf-8"):
            raise VerificationFailed(f"{report.name}: does not carry the decision {audit.decision.id[:16]}...")
    if audit.report == audit.signed_report:
        return "the signed report carries the decision"
    return f"the signed report, {audit.bundle.name}/{REPORT}, carries the decision; the run's own copy is not signed"


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
