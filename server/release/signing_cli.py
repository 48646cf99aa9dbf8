"""Sign a release as a second reviewer, or revoke one: `consilium release sign`, `consilium release revoke`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UsageError
from common.evidence.canonical import sha256_hex
from common.evidence.cli import read_trusted_key
from common.evidence.countersignature import add_countersignature
from common.evidence.predicate import Predicate, read_statement
from common.evidence.revocation import revoke as add_to_list
from common.evidence.signing import Purpose, check_signature, fingerprint, load_signing_key, parse_envelope
from common.evidence.verification import ATTESTATION, verify_bundle
from server.run_folder import RunFolder

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Key = Annotated[Path, typer.Option(help="Private key, PEM, that only you may read.", show_default=False)]


def sign(
    release: Annotated[Path, typer.Argument(help="Folder of a release or of a signed refusal.", show_default=False)],
    *,
    key: Key,
    role: Annotated[str, typer.Option(help="As whom you sign, such as 'data-protection officer'.", show_default=False)],
    auditor: Annotated[Path | None, typer.Option(help="PEM of the auditor's public key that you trust.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a release, then add your signature beside the auditor's."""
    now = datetime.now(UTC)
    private = load_signing_key(key)
    verified = verify_bundle(release, trusted_key=read_trusted_key(auditor), now=now)
    path = add_countersignature(
        release,
        release_digest=verified.digest,
        predicate=verified.predicate,
        auditor=verified.key_fingerprint,
        role=role,
        key=private,
        now=now,
    )
    facts = {
        "file": str(path),
        "release_digest": verified.digest,
        "outcome": verified.outcome.value,
        "key_fingerprint": fingerprint(private.public_key()),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        typer.echo(f"signed   {verified.outcome.value} {verified.digest} as {role!r}")
        typer.echo(f"key      {facts['key_fingerprint']}")
        typer.echo(f"file     {path}")


def revoke(
    release: Annotated[Path, typer.Argument(help="Folder of a release, or of its run.", show_default=False)],
    *,
    reason: Annotated[str, typer.Option(help="Why, in one sentence without patient data.", show_default=False)],
    revocations: Annotated[
        Path, typer.Option("--list", help="The auditor's list of revocations; made when missing.", show_default=False)
    ],
    key: Key,
    as_json: AsJson = False,
) -> None:
    """Put a release on the auditor's signed list of what must not be used any more."""
    private = load_signing_key(key)
    folder = RunFolder(path=release).release if RunFolder(path=release).facts_file.is_file() else release
    data = _attestation(folder)
    envelope = parse_envelope(data, ATTESTATION, Purpose.RELEASE)
    check_signature(envelope, private.public_key(), ATTESTATION)  # nobody else's list would be believed
    predicate: Predicate = read_statement(envelope.payload, ATTESTATION).predicate
    written = add_to_list(
        revocations,
        release_digest=sha256_hex(data),
        decision_id=predicate.decision_id,
        reason=reason,
        key=private,
        now=datetime.now(UTC),
    )
    facts = {"list": str(revocations), "number": written.number, "release_digest": sha256_hex(data)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        typer.echo(f"revoked  {facts['release_digest']} ({predicate.decision.study})")
        typer.echo(f"list     {revocations}, number {written.number}, {len(written.revoked)} releases")
        typer.echo(f"give it to whoever has the release: consilium verify RELEASE --revocations {revocations.name}")


def _attestation(folder: Path) -> bytes:
    """As it lies there: a release that was damaged since can be revoked all the same."""
    try:
        return (folder / ATTESTATION).read_bytes()
    except OSError as error:
        raise UsageError(f"{folder} is neither a release nor a finished run; nothing was revoked.") from error
