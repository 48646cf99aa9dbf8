"""What a site signs about its part in a study: a receipt, checked by the coordinator and by anybody who verifies.

A receipt holds digests of what has left the site and facts that the site has stated before. It tells nothing
about a patient that its replies did not tell, and it cannot be changed, or made, by the coordinator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from common.errors import VerificationFailed
from common.evidence.canonical import canonical_json
from common.evidence.predicate import Digest, Fact, SiteName
from common.evidence.signing import (
    Purpose,
    check_signature,
    parse_envelope,
    read_public_key_hex,
    seal,
)

LARGEST_RECEIPT = 2 * 2**20  # bytes; some 5000 answers
_Count = Annotated[int, Field(ge=0, le=10**6)]


class Answered(Fact):
    """One reply that has left the site, by digests alone.

    question, answer: of order and reply as the protocol identifies them. weights: the generator that came out of
    training, or that was scored or asked about in the course. plan: the audit plan that was answered. policy: of the
    hospital, as it allowed this.
    """

    kind: Literal["warm-up", "train", "score", "utility", "course"]
    question: Digest
    answer: Digest
    round: _Count | None = None
    weights: Digest | None = None
    plan: Digest | None = None
    policy: Digest | None = None


class Receipt(Fact):
    """All that one site states about one study. members, nonmembers: mechanisms in its ledger, as JSON text each."""

    schema_version: Literal[1] = 1
    study_digest: Digest
    site: SiteName
    simulated: bool
    holdout_commitment: Digest
    policy_digest: Digest
    code_digest: Digest
    ledger_rows: _Count
    ledger_head: Digest
    members: tuple[str, ...]
    nonmembers: tuple[str, ...]
    answers: tuple[Answered, ...]


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a site said elsewhere, or what was used of its replies; its receipt must say the same.

    trained: digest of the generator that was used, by round. scored: generator and audit plan of the answer that was
    used, and that answer's digest where it is known; None when the site's answer was not used.
    """

    study_digest: str
    site: str
    simulated: bool
    holdout_commitment: str
    policy_digest: str
    code_digest: str
    ledger_head: str
    members: tuple[str, ...]
    nonmembers: tuple[str, ...]
    trained: Mapping[int, str]
    scored: tuple[str, str, str | None] | None


def sign_receipt(receipt: Receipt, key: Ed25519PrivateKey) -> str:
    """The receipt in its envelope, as text for a reply and for a file."""
    return seal(_payload(receipt), key, Purpose.SITE_RECEIPT).decode("ascii")


def read_receipt(data: bytes, name: str) -> Receipt:
    """The receipt in an envelope, by whomever: for the site's own check before it leaves.

    name: the file, for the VerificationFailed that is raised when it is not exactly a receipt.
    """
    if len(data) > LARGEST_RECEIPT:
        raise VerificationFailed(f"{name}: {len(data)} bytes are more than a receipt has")
    payload = parse_envelope(data, name, Purpose.SITE_RECEIPT).payload
    try:
        receipt = Receipt.model_validate_json(payload)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "receipt"
        raise VerificationFailed(f"{name}: is not a receipt of a site ({where})") from error
    if _payload(receipt) != payload:  # another spelling would be room for something that is no field
        raise VerificationFailed(f"{name}: is not in canonical form")
    return receipt


def open_receipt(data: bytes, name: str, *, key: str) -> Receipt:
    """The receipt that the owner of `key` signed. key: hex, as the site enrolled with it.

    Raises VerificationFailed naming the file `name`.
    """
    receipt = read_receipt(data, name)
    envelope = parse_envelope(data, name, Purpose.SITE_RECEIPT)
    check_signature(envelope, read_public_key_hex(key, f"the key for {name}"), name)
    return receipt


def contradictions(receipt: Receipt, stated: Stated) -> Iterator[str]:
    """Where a receipt and what the same site said elsewhere differ, in words."""
    for field, what in _SAME.items():
        if getattr(receipt, field) != getattr(stated, field):
            yield f"the receipt names {what} than the site's replies"
    if any(a.policy not in (None, receipt.policy_digest) for a in receipt.answers):
        yield "the receipt names answers that another policy allowed"
    made = {(a.round, a.weights) for a in receipt.answers if a.kind == "train"}
    for number, weights in sorted(stated.trained.items()):
        if (number, weights) not in made:
            yield f"the receipt does not name the generator of round {number} that was used"
    if stated.scored is not None:
        weights, plan, answer = stated.scored
        scores = [a for a in receipt.answers if a.kind == "score" and (a.weights, a.plan) == (weights, plan)]
        if not scores:
            yield "the receipt does not name the audit plan and generator whose scores were used"
        elif answer is not None and answer not in {a.answer for a in scores}:
            yield "the receipt names other audit answers than those that were used"


_SAME = {
    "study_digest": "another study",
    "site": "another site",
    "simulated": "another kind of randomness",
    "holdout_commitment": "another hold-out",
    "policy_digest": "another policy",
    "code_digest": "another code version",
    "ledger_head": "another head of the ledger",
    "members": "other mechanisms for its members",
    "nonmembers": "other mechanisms for those held out",
}


def _payload(receipt: Receipt) -> bytes:
    return canonical_json(receipt.model_dump(mode="json", exclude_none=True))
