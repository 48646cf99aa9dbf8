"""Receipts of sites in a bundle: signed by the keys in the evidence chain, and saying what the decision says.

(a) every site of the decision has the receipt that the decision names, and there is no other
(b) its key is the one in the chain's enrolment record
(c) the signature holds, and the receipt says what the decision, the chain's statements and its rounds say
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import VerificationFailed
from common.evidence.canonical import Json, sha256_hex
from common.evidence.chain import Record
from common.evidence.predicate import (
    ANSWERS_RECORD,
    ENROLMENT_RECORD,
    QUESTION_RECORD,
    ROUND_RECORD,
    STATEMENTS_RECORD,
    Outcome,
    Predicate,
    SiteFacts,
)
from common.evidence.receipt import Stated, contradictions, open_receipt

RECEIPTS = "receipts"


def receipt_name(site: str) -> str:
    """Where a site's receipt lies in a bundle."""
    return f"{RECEIPTS}/{site}.dsse.json"


def check_receipts(
    predicate: Predicate, records: Sequence[Record], files: Mapping[str, bytes], *, evidence: str
) -> int:
    """Steps (a) to (c); how many receipts there are.

    files: bytes of all files under RECEIPTS by name. evidence: name of the chain's file. Raises VerificationFailed
    naming the file that does not hold.
    """
    decision = predicate.decision
    named = {receipt_name(site): site for site, facts in decision.sites.items() if facts.receipt is not None}
    if decision.outcome is Outcome.RELEASE and len(named) < len(decision.sites):
        without = sorted(decision.sites.keys() - set(named.values()))
        raise VerificationFailed(f"{receipt_name(without[0])}: is missing from a release")
    for name in sorted(files.keys() - named.keys()):
        raise VerificationFailed(f"{name}: is a receipt that the decision does not name")
    for name, site in sorted(named.items()):
        facts = decision.sites[site]
        if name not in files:
            raise VerificationFailed(f"{name}: is missing")
        if facts.receipt != sha256_hex(files[name]):  # (a)
            raise VerificationFailed(f"{name}: is not the receipt that the decision names")
        enrolled = _object(_last(records, ENROLMENT_RECORD).get("participants"), site, evidence)
        if facts.receipt_key is None or enrolled.get("receipt_key") != facts.receipt_key:  # (b)
            raise VerificationFailed(f"{evidence}: {site} enrolled with another receipt key than the signed one")
        receipt = open_receipt(files[name], name, key=facts.receipt_key)  # (c)
        for problem in contradictions(receipt, _stated(site, facts, predicate, records, evidence)):
            raise VerificationFailed(f"{name}: {problem}")
    return len(named)


def _stated(site: str, facts: SiteFacts, predicate: Predicate, records: Sequence[Record], evidence: str) -> Stated:
    """What decision and chain say that this site said."""
    statement = _object(_last(records, STATEMENTS_RECORD), site, evidence)
    enrolled = _object(_last(records, ENROLMENT_RECORD).get("participants"), site, evidence)
    return Stated(
        study_digest=predicate.decision.study_digest,
        site=site,
        simulated=enrolled.get("simulated") is True,
        holdout_commitment=facts.holdout_commitment,
        policy_digest=facts.policy_digest,
        code_digest=facts.code_digest,
        ledger_head=facts.ledger_head,
        members=_texts(statement.get("members")),
        nonmembers=_texts(statement.get("nonmembers")),
        trained=_trained(site, records),
        scored=_scored(site, records),
    )


def _trained(site: str, records: Sequence[Record]) -> dict[int, str]:
    """Digest of the site's generator that was used, by round."""
    found: dict[int, str] = {}
    for record in records:
        number, replies = record.body.get("round"), record.body.get("replies")
        if record.kind == ROUND_RECORD and isinstance(number, int) and isinstance(replies, Mapping):
            found.pop(number, None)  # recorded again: the last one counts
            if site in replies:
                found[number] = str(replies[site])
    return found


def _scored(site: str, records: Sequence[Record]) -> tuple[str, str, str | None] | None:
    """Generator and plan of the site's audit answer; None when none was used."""
    question, answers = _last(records, QUESTION_RECORD), _last(records, ANSWERS_RECORD)
    missing = answers.get("missing")
    if not question or not isinstance(missing, Mapping) or site in missing:
        return None
    return str(question.get("weights_digest")), str(question.get("plan_digest")), None


def _last(records: Sequence[Record], kind: str) -> Mapping[str, Json]:
    return next((record.body for record in reversed(records) if record.kind == kind), {})


def _object(value: Json, site: str, evidence: str) -> Mapping[str, Json]:
    facts = value.get(site) if isinstance(value, Mapping) else None
    if not isinstance(facts, Mapping):
        raise VerificationFailed(f"{evidence}: does not say what {site} enrolled with and stated")
    return facts


def _texts(value: Json) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
