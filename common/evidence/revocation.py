"""What must not be used any more: a numbered list that the auditor signs, and that whoever verifies may hold against
a release. A list replaces the one before it and repeats what that said, so the newest alone is needed.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AwareDatetime, Field, ValidationError

from common.errors import UsageError, VerificationFailed
from common.evidence.atomic import write_atomic
from common.evidence.canonical import canonical_json, sha256_hex
from common.evidence.predicate import Digest, Fact, Reason, utc_text
from common.evidence.signing import Purpose, check_signature, parse_envelope, seal

REVOCATIONS = "revocations.dsse.json"


class Revocation(Fact):
    """One release that must not be used any more. release_digest: SHA-256 of its attestation."""

    release_digest: Digest
    decision_id: Digest
    reason: Reason
    revoked: AwareDatetime = Field(strict=False)


class RevocationList(Fact):
    """All that an auditor has revoked. number: one more than the list before. previous: SHA-256 of that list."""

    schema_version: Literal[1] = 1
    number: Annotated[int, Field(ge=1, le=10**6)]
    previous: Digest | None
    issued: AwareDatetime = Field(strict=False)
    revoked: Annotated[tuple[Revocation, ...], Field(min_length=1)]

    def of(self, *, release_digest: str, decision_id: str) -> Revocation | None:
        """The revocation of a release, by its bundle or by its decision."""
        found = (r for r in self.revoked if r.release_digest == release_digest or r.decision_id == decision_id)
        return next(found, None)


def read_list(data: bytes, name: str, key: Ed25519PublicKey) -> RevocationList:
    """The list in `data`. Raises VerificationFailed, naming the file, unless `key`, the auditor's, signed it."""
    envelope = parse_envelope(data, name, Purpose.REVOCATIONS)
    check_signature(envelope, key, name)
    try:
        return RevocationList.model_validate_json(envelope.payload)
    except ValidationError as error:
        raise VerificationFailed(f"{name}: is not a list of revocations") from error


def revoke(
    path: Path,
    *,
    release_digest: str,
    decision_id: str,
    reason: str,
    key: Ed25519PrivateKey,
    now: datetime,
) -> RevocationList:
    """Add a release to the list in `path`, which is made when missing; the whole list is signed again.

    now: aware. Raises UsageError for a release that is on it, or a reason that is not plain text of 10 to 500
    characters, VerificationFailed when the list there is not signed by `key`.
    """
    before = path.read_bytes() if path.exists() else None
    old = None if before is None else read_list(before, path.name, key.public_key())
    if old is not None and old.of(release_digest=release_digest, decision_id=decision_id):
        raise UsageError(f"{path} names this release already; nothing was changed.")
    moment = now.replace(microsecond=0)
    try:
        added = Revocation(release_digest=release_digest, decision_id=decision_id, reason=reason, revoked=moment)
    except ValidationError as error:
        raise UsageError("the reason must be 10 to 500 printable characters; nothing was revoked.") from error
    new = RevocationList(
        number=old.number + 1 if old else 1,
        previous=sha256_hex(before) if before is not None else None,
        issued=moment,
        revoked=(*(old.revoked if old else ()), added),
    )
    write_atomic(path, seal(canonical_json(new.model_dump(mode="json")), key, Purpose.REVOCATIONS))
    return new


def check_revocations(
    given: bytes | None,
    beside: bytes | None,
    *,
    name: str,
    key: Ed25519PublicKey,
    release_digest: str,
    decision_id: str,
) -> RevocationList | None:
    """The newest list that was held against a release, None when there is none.

    given: the list that the caller brought, called `name`. beside: the one that lies in the bundle. Raises
    VerificationFailed for a list of another key, a given one that is older than the bundle's, or a release that
    either names.
    """
    known = None if beside is None else read_list(beside, REVOCATIONS, key)
    brought = None if given is None else read_list(given, name, key)
    if known and brought and brought.number < known.number:
        raise VerificationFailed(
            f"{name}: is list {brought.number}, older than list {known.number} in the bundle. Ask for the newest."
        )
    newest = brought or known
    for checked, where in ((brought, name), (known, REVOCATIONS)):
        found = checked.of(release_digest=release_digest, decision_id=decision_id) if checked else None
        if checked and found:
            raise VerificationFailed(
                f"{where}: this release was revoked on {utc_text(found.revoked)} (list {checked.number}): "
                f"{found.reason}. Do not use it; ask the auditor what replaces it."
            )
    return newest
