"""The gate and the receipts of sites: missing cannot be judged, wrong is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signed_evidence import SITE_KEYS, receipt_of

from common.evidence.predicate import Outcome
from common.evidence.receipt import sign_receipt
from common.evidence.signing import public_key_hex
from common.privacy.mechanism_json import mechanism_json, parse_mechanism
from common.protocol import codec
from common.protocol.messages import EnrolReply, LedgerHead, ScoreReply, StatementReply
from server.release.evidence import ObjectionKind, ReleaseEvidence, SiteStatement
from server.release.gate import decide
from server.release.policies import ReceiptsHold, default_policies
from server.release.receipts import SiteReceipt

KEY = SITE_KEYS["site-1"]
Change = Callable[..., ReleaseEvidence]


def enrolled(statement: SiteStatement) -> EnrolReply:
    return EnrolReply(
        study_digest=statement.study_digest,
        holdout_commitment=statement.holdout_commitment,
        policy_digest=statement.policy_digest,
        code_digest=statement.code_digest,
        simulated=statement.simulated,
        receipt_key=public_key_hex(KEY.public_key()),
    )


def stated(evidence: ReleaseEvidence, key: Ed25519PrivateKey = KEY, **changes: object) -> StatementReply:
    """What site-1 says at the end, and its receipt, with fields of the receipt replaced."""
    statement = evidence.statements["site-1"]
    receipt = receipt_of("site-1", statement, evidence.study, evidence.generator_digest)
    return StatementReply(
        study_digest=statement.study_digest,
        members=statement.members.mechanisms,
        nonmembers=statement.nonmembers.mechanisms,
        ledger_head=LedgerHead(rows=9, hash=statement.ledger_head),
        receipt=sign_receipt(receipt.model_copy(update=changes), key),
    )


def checked(evidence: ReleaseEvidence, reply: StatementReply, scored: ScoreReply | None = None) -> SiteStatement:
    statement = evidence.statements["site-1"]
    return SiteStatement.of(
        "site-1", enrolled=enrolled(statement), stated=reply, trained={}, scored=scored, delta=statement.members.delta
    )


def test_an_honest_receipt_meets_no_objection(evidence: ReleaseEvidence, change_site: Change):
    found = checked(evidence, stated(evidence))
    assert found.receipt is not None
    assert found.receipt.problems == ()
    assert found.receipt.sealed == stated(evidence).receipt
    assert list(ReceiptsHold().objections(change_site(evidence, receipt=found.receipt))) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "site-2"}, "another site"),
        ({"study_digest": "0" * 64}, "another study"),
        ({"policy_digest": "0" * 64}, "another policy"),
        ({"ledger_head": "0" * 64}, "another head of the ledger"),
        ({"members": ()}, "other mechanisms for its members"),
    ],
)
def test_a_receipt_that_contradicts_the_sites_replies_is_a_reject(
    evidence: ReleaseEvidence, change_site: Change, changes: dict[str, object], words: str
):
    receipt = checked(evidence, stated(evidence, **changes)).receipt
    assert receipt is not None
    assert receipt.digest is None
    decision = decide(change_site(evidence, receipt=receipt), default_policies(evidence.study))
    assert decision.outcome is Outcome.REJECT
    assert any(reason.startswith("site-1: the receipt") and words in reason for reason in decision.reasons)
    assert decision.facts.sites["site-1"].receipt is None


def test_a_receipt_of_another_key_is_a_reject(evidence: ReleaseEvidence, change_site: Change):
    receipt = checked(evidence, stated(evidence, key=Ed25519PrivateKey.generate())).receipt
    (objection,) = ReceiptsHold().objections(change_site(evidence, receipt=receipt))
    assert objection.kind is ObjectionKind.REFUSE
    assert "was signed by key" in objection.text


def test_a_statement_without_a_receipt_is_inconclusive(evidence: ReleaseEvidence, change_site: Change):
    for receipt in (None, checked(evidence, replace(stated(evidence), receipt=None)).receipt):
        decision = decide(change_site(evidence, receipt=receipt), default_policies(evidence.study))
        assert decision.outcome is Outcome.INCONCLUSIVE
        assert decision.reasons == ("site-1 has not signed a receipt",)


def test_two_sites_with_one_receipt_key_are_a_reject(evidence: ReleaseEvidence, change_site: Change):
    shared = evidence.statements["site-2"].receipt
    assert isinstance(shared, SiteReceipt)
    (objection,) = ReceiptsHold().objections(change_site(evidence, receipt=shared))
    assert (objection.kind, objection.text) == (ObjectionKind.REFUSE, "site-2 and site-1 share one receipt key")


def test_an_audit_answer_that_the_site_did_not_give_is_a_reject(evidence: ReleaseEvidence, change_site: Change):
    assert evidence.audit is not None
    scored = ScoreReply(
        study_digest=evidence.study_digest,
        weights_digest=evidence.generator_digest,
        audit_plan_digest=evidence.audit.plan_digest,
        histograms=(),
        critic_tells=None,
        ledger_head=LedgerHead(rows=8, hash="7" * 64),
    )
    honest = receipt_of("site-1", evidence.statements["site-1"], evidence.study, evidence.generator_digest)
    own = honest.answers[-1].model_copy(update={"answer": codec.digest(scored)})
    good = stated(evidence, answers=(*honest.answers[:-1], own))
    assert checked(evidence, good, scored).receipt.problems == ()  # type: ignore[union-attr]
    found = checked(evidence, good, replace(scored, critic_tells=True)).receipt
    assert found is not None
    assert found.problems == ("the receipt names other audit answers than those that were used",)


def test_mechanisms_of_a_receipt_read_back_as_those_of_the_statement(evidence: ReleaseEvidence):
    for mechanism in evidence.statements["site-1"].members.mechanisms:
        assert parse_mechanism(mechanism_json(mechanism)) == mechanism
