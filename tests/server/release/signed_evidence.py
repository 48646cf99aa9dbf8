"""Receipts that honest sites would sign for the evidence of these tests, and the chain of the campaign behind it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.evidence.canonical import sha256_hex
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import (
    ANSWERS_RECORD,
    ENROLMENT_RECORD,
    QUESTION_RECORD,
    ROUND_RECORD,
    STATEMENTS_RECORD,
)
from common.evidence.receipt import Answered, Receipt, sign_receipt
from common.evidence.signing import public_key_hex
from common.privacy.mechanism_json import mechanism_json
from common.settings.load import study_digest
from common.settings.study import Study
from server.release.evidence import ReleaseEvidence, SiteStatement
from server.release.receipts import SiteReceipt

SITES = ("site-1", "site-2")
ROUNDS = 2
SITE_KEYS = {site: Ed25519PrivateKey.from_private_bytes(site.encode().ljust(32, b".")) for site in SITES}
AUDIT_PLAN_DIGEST = "d" * 64


def trained_digest(site: str, number: int) -> str:
    """Of the generator that a site returned in a round."""
    return sha256_hex(f"{site} round {number}".encode())


def receipt_of(site: str, statement: SiteStatement, study: Study, generator_digest: str) -> Receipt:
    """What an honest site would sign: its statement, its rounds and its audit answer."""
    trained = tuple(
        Answered(kind="train", question="1" * 64, answer="2" * 64, round=n + 1, weights=trained_digest(site, n + 1))
        for n in range(ROUNDS)
    )
    scored = Answered(
        kind="score", question="3" * 64, answer="4" * 64, weights=generator_digest, plan=AUDIT_PLAN_DIGEST
    )
    return Receipt(
        study_digest=study_digest(study),
        site=site,
        simulated=statement.simulated,
        holdout_commitment=statement.holdout_commitment,
        policy_digest=statement.policy_digest,
        code_digest=statement.code_digest,
        ledger_rows=9,
        ledger_head=statement.ledger_head,
        members=tuple(map(mechanism_json, statement.members.mechanisms)),
        nonmembers=tuple(map(mechanism_json, statement.nonmembers.mechanisms)),
        answers=(*trained, scored),
    )


def with_receipt(site: str, statement: SiteStatement, study: Study, generator_digest: str) -> SiteStatement:
    """The statement with the receipt that goes with it."""
    key = SITE_KEYS[site]
    envelope = sign_receipt(receipt_of(site, statement, study, generator_digest), key)
    return replace(statement, receipt=SiteReceipt(key=public_key_hex(key.public_key()), envelope=envelope))


def record_campaign(chain: EvidenceChain, evidence: ReleaseEvidence, now: datetime) -> None:
    """What the campaign of such evidence would have put into the chain before the decision."""
    participants: dict[str, Any] = {
        site: {
            "holdout_commitment": s.holdout_commitment,
            "policy_digest": s.policy_digest,
            "code_digest": s.code_digest,
            "simulated": s.simulated,
            "receipt_key": s.receipt.key if s.receipt else None,
        }
        for site, s in evidence.statements.items()
    }
    chain.append(ENROLMENT_RECORD, {"participants": participants}, now)
    for number in range(1, ROUNDS + 1):
        replies = {site: trained_digest(site, number) for site in evidence.sites}
        chain.append(ROUND_RECORD, {"round": number, "replies": replies}, now)
    question = {"plan_digest": AUDIT_PLAN_DIGEST, "weights_digest": evidence.generator_digest}
    chain.append(QUESTION_RECORD, question, now)
    chain.append(ANSWERS_RECORD, {"missing": {}}, now)
    statements: dict[str, Any] = {
        site: {
            "members": [mechanism_json(m) for m in s.members.mechanisms],
            "nonmembers": [mechanism_json(m) for m in s.nonmembers.mechanisms],
            "ledger_head": {"rows": 9, "hash": s.ledger_head},
        }
        for site, s in evidence.statements.items()
    }
    chain.append(STATEMENTS_RECORD, statements, now)


def receipts_of(evidence: ReleaseEvidence) -> dict[str, str]:
    """Envelopes by site, for a dossier."""
    return {site: s.receipt.sealed for site, s in evidence.statements.items() if s.receipt and s.receipt.sealed}
