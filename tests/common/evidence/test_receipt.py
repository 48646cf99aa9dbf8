"""A site's receipt says only what it may, is believed from its own key only, and is held against all that it said."""

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import VerificationFailed
from common.evidence.canonical import canonical_json
from common.evidence.receipt import (
    LARGEST_RECEIPT,
    Answered,
    Receipt,
    Stated,
    contradictions,
    open_receipt,
    read_receipt,
    sign_receipt,
)
from common.evidence.signing import Purpose, public_key_hex, seal, seal_json

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_key_hex(KEY.public_key())
A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
RECEIPT = Receipt(
    study_digest=A,
    site="site-1",
    simulated=False,
    holdout_commitment=B,
    policy_digest=C,
    code_digest=D,
    ledger_rows=9,
    ledger_head=A,
    members=('{"epsilon": 1.0, "kind": "noised_counts"}',),
    nonmembers=(),
    answers=(
        Answered(kind="train", question=A, answer=B, round=1, weights=C),
        Answered(kind="score", question=B, answer=C, weights=D, plan=A),
    ),
)
STATED = Stated(
    study_digest=A,
    site="site-1",
    simulated=False,
    holdout_commitment=B,
    policy_digest=C,
    code_digest=D,
    ledger_head=A,
    members=RECEIPT.members,
    nonmembers=(),
    trained={1: C},
    scored=(D, A, C),
)


def sealed(body: dict[str, Any]) -> bytes:
    return seal_json(body, KEY, Purpose.SITE_RECEIPT)


def body(**changes: Any) -> dict[str, Any]:
    return {**RECEIPT.model_dump(mode="json", exclude_none=True), **changes}


def test_a_receipt_comes_back_from_its_envelope_and_contradicts_nothing():
    receipt = open_receipt(sign_receipt(RECEIPT, KEY).encode(), "r", key=PUBLIC)
    assert receipt == RECEIPT
    assert list(contradictions(receipt, STATED)) == []


def test_a_receipt_signed_by_another_key_is_not_believed():
    forged = sign_receipt(RECEIPT, Ed25519PrivateKey.generate()).encode()
    with pytest.raises(VerificationFailed, match="r: was signed by key"):
        open_receipt(forged, "r", key=PUBLIC)


def test_every_flipped_bit_of_a_receipt_is_seen():
    good = sign_receipt(RECEIPT, KEY).encode()
    unseen = []
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        try:
            open_receipt(bytes(bad), "r", key=PUBLIC)
        except VerificationFailed:
            continue
        unseen.append(at)
    assert unseen == []


@pytest.mark.parametrize(
    "changes",
    [
        {"patient": "DOE_JANE"},
        {"site": "/data/DOE JANE"},
        {"holdout_commitment": "DOE_JANE"},
        {"ledger_rows": 19580312_0000},
        {"ledger_rows": True},
        {"simulated": "DOE"},
        {"answers": [{"kind": "DOE_JANE", "question": A, "answer": B}]},
        {"answers": [{"kind": "train", "question": A, "answer": B, "round": 1, "weights": C, "note": "DOE"}]},
        {"schema_version": 2},
    ],
    ids=str,
)
def test_a_receipt_has_no_room_for_anything_undeclared(changes: dict[str, Any]):
    with pytest.raises(VerificationFailed, match="r: is not a receipt of a site"):
        read_receipt(sealed(body(**changes)), "r")


def test_another_spelling_of_a_receipt_is_refused():
    for payload in (
        canonical_json(body()) + b"\n",
        canonical_json(body(answers=[{**body()["answers"][1], "round": None}])),
    ):
        with pytest.raises(VerificationFailed, match="canonical form"):
            read_receipt(seal(payload, KEY, Purpose.SITE_RECEIPT), "r")


def test_a_receipt_is_bounded_in_size():
    with pytest.raises(VerificationFailed, match="more than a receipt has"):
        read_receipt(b" " * (LARGEST_RECEIPT + 1), "r")


def test_five_thousand_answers_fit():
    many = RECEIPT.model_copy(update={"answers": RECEIPT.answers[:1] * 5000})
    assert len(sign_receipt(many, KEY)) < LARGEST_RECEIPT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"study_digest": B}, "another study"),
        ({"site": "site-2"}, "another site"),
        ({"simulated": True}, "another kind of randomness"),
        ({"holdout_commitment": A}, "another hold-out"),
        ({"policy_digest": A}, "another policy"),
        ({"code_digest": A}, "another code version"),
        ({"ledger_head": B}, "another head of the ledger"),
        ({"members": ()}, "other mechanisms for its members"),
        ({"nonmembers": RECEIPT.members}, "other mechanisms for those held out"),
        ({"trained": {1: C, 2: C}}, "generator of round 2"),
        ({"trained": {1: D}}, "generator of round 1"),
        ({"scored": (C, A, C)}, "audit plan and generator"),
        ({"scored": (D, B, C)}, "audit plan and generator"),
        ({"scored": (D, A, B)}, "other audit answers"),
    ],
)
def test_each_difference_from_what_the_site_said_is_one_contradiction(changes: dict[str, Any], words: str):
    found = list(contradictions(RECEIPT, replace(STATED, **changes)))
    assert len(found) == 1
    assert words in found[0]


def test_an_answer_that_another_policy_allowed_is_a_contradiction():
    same, other = (
        RECEIPT.model_copy(update={"answers": tuple(a.model_copy(update={"policy": p}) for a in RECEIPT.answers)})
        for p in (C, D)
    )
    assert list(contradictions(same, STATED)) == []
    assert list(contradictions(other, STATED)) == ["the receipt names answers that another policy allowed"]


def test_answers_that_were_not_used_contradict_nothing():
    assert list(contradictions(RECEIPT, replace(STATED, trained={}, scored=None))) == []
    assert list(contradictions(RECEIPT, replace(STATED, scored=(D, A, None)))) == []
