"""Signatures that others than the auditor add to a bundle: a data-protection officer, a second reviewer.

They lie beside the signed files, in a folder of their own, each over the digest of the auditor's attestation: adding
one changes no byte of what was signed before, and one of another bundle does not fit. Anybody can add one, so it
says something only about a key that the reader knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AwareDatetime, Field, ValidationError

from common.errors import UsageError, VerificationFailed
from common.evidence.atomic import write_atomic
from common.evidence.canonical import canonical_json
from common.evidence.predicate import Digest, Fact, Predicate
from common.evidence.signing import (
    Purpose,
    check_signature,
    fingerprint,
    parse_envelope,
    public_key_hex,
    read_public_key_hex,
    seal,
)

COUNTERSIGNATURES = "countersignatures"
Words = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,200}$")]  # cannot steer a terminal


class Countersignature(Fact):
    """What was countersigned, and as whom. key: hex; release_digest: SHA-256 of the attestation."""

    schema_version: Literal[1] = 1
    release_digest: Digest
    decision_id: Digest
    role: Words
    signed: AwareDatetime = Field(strict=False)
    key: Digest

    @property
    def fingerprint(self) -> str:
        """Of the key, as `consilium verify` shows it."""
        return fingerprint(read_public_key_hex(self.key, "countersignature"))


def add_countersignature(
    folder: Path,
    *,
    release_digest: str,
    predicate: Predicate,
    auditor: str,
    role: str,
    key: Ed25519PrivateKey,
    now: datetime,
) -> Path:
    """Add a countersignature to a bundle that was verified; returns its file.

    auditor: fingerprint of the key that signed the bundle; now: aware. Raises UsageError when this key has signed
    already, as the auditor or as a reviewer, or for a role that is not plain text.
    """
    if fingerprint(key.public_key()) == auditor:
        raise UsageError("this is the auditor's own key, which has signed already; nothing was written. Use another.")
    try:
        signed = Countersignature(
            release_digest=release_digest,
            decision_id=predicate.decision_id,
            role=role,
            signed=now.replace(microsecond=0),
            key=public_key_hex(key.public_key()),
        )
    except ValidationError as error:
        raise UsageError("the role must be 1 to 200 printable characters; nothing was signed.") from error
    path = folder / COUNTERSIGNATURES / f"{fingerprint(key.public_key())[:16]}.dsse.json"
    if path.exists():
        raise UsageError(f"{path} is there already: this key has signed; nothing was written.")
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, seal(canonical_json(signed.model_dump(mode="json")), key, Purpose.COUNTERSIGNATURE))
    return path


def check_countersignatures(
    files: Mapping[str, bytes], *, release_digest: str, predicate: Predicate, auditor: str
) -> tuple[Countersignature, ...]:
    """All countersignatures in `files`, bytes by name: each by a key of its own, none by the auditor's.

    auditor: fingerprint of the key that signed the bundle. Raises VerificationFailed naming one that does not hold.
    """
    signed = {name: _check(files[name], name, release_digest, predicate) for name in sorted(files)}
    signers = {auditor: "the auditor"}
    for name, countersignature in signed.items():
        if countersignature.fingerprint in signers:
            other = signers[countersignature.fingerprint]
            raise VerificationFailed(f"{name}: is by the key of {other}, and so no second review")
        signers[countersignature.fingerprint] = name
    return tuple(signed.values())


def _check(data: bytes, name: str, release_digest: str, predicate: Predicate) -> Countersignature:
    envelope = parse_envelope(data, name, Purpose.COUNTERSIGNATURE)
    try:
        signed = Countersignature.model_validate_json(envelope.payload)
    except ValidationError as error:
        raise VerificationFailed(f"{name}: is not a countersignature") from error
    check_signature(envelope, read_public_key_hex(signed.key, name), name)
    if (signed.release_digest, signed.decision_id) != (release_digest, predicate.decision_id):
        raise VerificationFailed(f"{name}: was made for another bundle")
    return signed
