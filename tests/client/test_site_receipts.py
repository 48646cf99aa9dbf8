"""What a site signs: digests of what left it and facts that it has stated, with a key that never leaves."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from small_site import (
    STUDY_DIGEST,
    QuickWork,
    enrol_order,
    open_site,
    policy,
    score_order,
    site_log,
    statement_order,
    train_order,
    utility_order,
)

from client.store import SiteStore
from common.evidence.receipt import Receipt, open_receipt
from common.evidence.signing import public_key_hex
from common.privacy.mechanism_json import mechanism_json
from common.protocol import codec
from common.protocol.messages import (
    EnrolReply,
    LedgerHead,
    RefusalCode,
    RefusalReply,
    ScoreReply,
    StatementReply,
    TrainReply,
)

REAL = {"simulation_seed": None}


def enrolled(folder: Path, **changes: object) -> EnrolReply:
    reply = open_site(folder, **changes).handle(enrol_order())
    assert isinstance(reply, EnrolReply), site_log(folder)
    return reply


def stated(folder: Path, **changes: object) -> StatementReply:
    reply = open_site(folder, **changes).handle(statement_order())
    assert isinstance(reply, StatementReply), site_log(folder)
    return reply


def receipt(folder: Path, joined: EnrolReply, **changes: object) -> Receipt:
    statement = stated(folder, **changes)
    assert statement.receipt is not None
    return open_receipt(statement.receipt.encode(), "receipt", key=joined.receipt_key)


def test_a_statement_carries_a_receipt_that_repeats_it_under_the_key_of_the_enrolment(tmp_path):
    joined = enrolled(tmp_path)
    open_site(tmp_path).handle(train_order(1))
    statement, found = stated(tmp_path), receipt(tmp_path, joined)
    assert (found.study_digest, found.site, found.simulated) == (STUDY_DIGEST, "site-1", True)
    assert (found.holdout_commitment, found.policy_digest, found.code_digest) == (
        joined.holdout_commitment,
        joined.policy_digest,
        joined.code_digest,
    )
    assert LedgerHead(rows=found.ledger_rows, hash=found.ledger_head) == statement.ledger_head
    assert found.members == tuple(map(mechanism_json, statement.members))
    assert found.nonmembers == ()


def test_a_receipt_names_every_answer_that_left_by_its_digests(tmp_path):
    joined, site = enrolled(tmp_path), open_site(tmp_path)
    trained, scored, used = (site.handle(order) for order in (train_order(1), score_order(), utility_order()))
    assert isinstance(trained, TrainReply)
    assert isinstance(scored, ScoreReply)
    named = {answer.kind: answer for answer in receipt(tmp_path, joined).answers}
    assert {kind: answer.answer for kind, answer in named.items()} == {
        "train": codec.digest(trained),
        "score": codec.digest(scored),
        "utility": codec.digest(used),
    }
    assert (named["train"].round, named["train"].weights) == (1, trained.weights_digest)
    assert (named["score"].weights, named["score"].plan) == (scored.weights_digest, scored.audit_plan_digest)
    assert named["score"].question == codec.digest(score_order())


def test_an_answer_that_is_asked_for_again_is_named_once(tmp_path):
    joined = enrolled(tmp_path)
    for _ in range(2):
        open_site(tmp_path).handle(train_order(1))
    assert len(receipt(tmp_path, joined).answers) == 1


def test_what_was_kept_back_or_refused_is_not_in_the_receipt(tmp_path):
    joined = enrolled(tmp_path)
    assert isinstance(open_site(tmp_path, QuickWork(extra_array=True)).handle(train_order(1)), RefusalReply)
    assert isinstance(open_site(tmp_path).handle(score_order(weights_digest="0" * 64)), RefusalReply)
    assert receipt(tmp_path, joined).answers == ()


def test_the_key_is_the_sites_own_secret_and_lasts(tmp_path):
    joined = enrolled(tmp_path, **REAL)
    path = tmp_path / "state" / "receipt.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert enrolled(tmp_path, **REAL).receipt_key == joined.receipt_key
    assert receipt(tmp_path, joined, **REAL).simulated is False
    secret = SiteStore(tmp_path / "state").receipt_key().private_bytes_raw()
    assert public_key_hex(Ed25519PrivateKey.from_private_bytes(secret).public_key()) == joined.receipt_key
    ledger_key = SiteStore(tmp_path / "state").ledger_key(bytes(32))
    assert secret != ledger_key  # two purposes, two secrets


def test_two_sites_have_two_keys(tmp_path):
    assert enrolled(tmp_path / "1", **REAL).receipt_key != enrolled(tmp_path / "2", **REAL).receipt_key
    assert enrolled(tmp_path / "3").receipt_key != enrolled(tmp_path / "4", site="site-2").receipt_key


def test_a_lost_or_damaged_key_makes_no_other_but_a_refusal(tmp_path):
    enrolled(tmp_path, **REAL)
    path = tmp_path / "state" / "receipt.key"
    good = path.read_bytes()
    for bad in (None, good[:-1] + bytes([good[-1] ^ 1])):
        path.unlink(missing_ok=True)
        if bad is not None:
            path.write_bytes(bad)
        reply = open_site(tmp_path, **REAL).handle(statement_order())
        assert reply == RefusalReply(code=RefusalCode.INTERNAL)
        assert "receipt.key" in site_log(tmp_path)


def test_a_damaged_note_of_what_left_is_never_signed(tmp_path):
    enrolled(tmp_path)
    open_site(tmp_path).handle(train_order(1))
    (note,) = (tmp_path / "state" / "studies" / STUDY_DIGEST / "left").iterdir()
    note.write_bytes(note.read_bytes().replace(b"train", b"score"))
    assert open_site(tmp_path).handle(statement_order()) == RefusalReply(code=RefusalCode.INTERNAL)


def test_a_policy_that_changed_since_enrolment_shows_in_the_receipt(tmp_path):
    joined = enrolled(tmp_path)
    changed = policy(epsilon_cap=39.0)
    assert receipt(tmp_path, joined, allowed=changed).policy_digest == changed.digest != joined.policy_digest


@pytest.mark.parametrize("secret", ["p000", "state", "ledger.sqlite"])
def test_no_patient_and_no_path_is_in_a_receipt(tmp_path, secret: str):
    joined = enrolled(tmp_path)
    open_site(tmp_path).handle(train_order(1))
    assert secret not in receipt(tmp_path, joined).model_dump_json()


def test_every_answer_names_the_policy_that_allowed_it(tmp_path):
    joined = enrolled(tmp_path)
    strict = policy(epsilon_cap=39.0)
    open_site(tmp_path).handle(train_order(1))
    open_site(tmp_path, allowed=strict).handle(train_order(2))
    open_site(tmp_path, allowed=strict).handle(train_order(1))  # repeated: it left under the first
    assert [a.policy for a in receipt(tmp_path, joined).answers] == [joined.policy_digest, strict.digest]
