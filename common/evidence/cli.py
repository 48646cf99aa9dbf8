"""`consilium verify`: whether a release, or a refusal, is what its auditor signed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import ExitCode, UsageError
from common.evidence.predicate import CohortEpsilon, Outcome, utc_text
from common.evidence.verification import Verified, verify_bundle


def verify(
    release: Annotated[Path, typer.Argument(help="Folder of a release or of a signed refusal.", show_default=False)],
    key: Annotated[
        Path | None,
        typer.Option(help="PEM of the auditor's public key that you trust; without it only integrity is checked."),
    ] = None,
    revocations: Annotated[
        Path | None, typer.Option(help="The auditor's newest list of revocations; a release that it names is refused.")
    ] = None,
    reviewer: Annotated[
        list[Path] | None, typer.Option(help="PEM of a second key that must have signed as well. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a release offline. Exit code 0 only for an authentic RELEASE; a refusal, even authentic, is 1."""
    verified = verify_bundle(
        release,
        trusted_key=read_trusted_key(key),
        now=datetime.now(UTC),
        revocations=read_revocations(revocations),
        reviewers={str(path): _read(path, "reviewer's key") for path in reviewer or ()},
    )
    if as_json:
        typer.echo(json.dumps(_facts(verified), indent=2, sort_keys=True))
    else:
        typer.echo("\n".join(_lines(verified)))
    if verified.outcome is not Outcome.RELEASE:
        raise typer.Exit(code=ExitCode.REFUSED)


def read_trusted_key(key: Path | None) -> bytes | None:
    """The PEM given with --key, if any. Raises UsageError when it cannot be read."""
    return None if key is None else _read(key, "trusted key")


def read_revocations(path: Path | None) -> tuple[str, bytes] | None:
    """Name and bytes of the list given with --revocations, if any. Raises UsageError when it cannot be read."""
    return None if path is None else (str(path), _read(path, "list of revocations"))


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the {what} {path} cannot be read ({error.strerror}); nothing was verified") from error


def _facts(verified: Verified) -> dict[str, Any]:
    predicate = verified.predicate.json_value()
    decision = predicate.pop("decision")
    return {
        "verified": True,
        "released": verified.outcome is Outcome.RELEASE,
        "unsafe": verified.predicate.bypass is not None,
        "countersigned": [
            {"role": signed.role, "key_fingerprint": signed.fingerprint, "signed": utc_text(signed.signed)}
            for signed in verified.countersigned
        ],
        "revocation_list": verified.revocations.number if verified.revocations else None,
        "key_fingerprint": verified.key_fingerprint,
        "key_pinned": verified.pinned,
        "release_digest": verified.digest,
        "files": verified.files,
        "findings": list(verified.findings),
        **predicate,
        **decision,
    }


def _lines(verified: Verified) -> Iterator[str]:
    predicate, decision = verified.predicate, verified.predicate.decision
    if predicate.bypass is not None:
        yield f"UNSAFE: NOT A RELEASE. The gate decided {decision.outcome}; somebody overruled it. Do not use this."
        yield f"  reason that was given: {predicate.bypass.reason}"
    if verified.outcome is Outcome.RELEASE:
        yield f"VERIFIED: an authentic RELEASE of {decision.study}"
    else:
        kind = "AN UNSAFE BYPASS OF A REFUSAL" if predicate.bypass else "A REFUSAL"
        yield f"VERIFIED AS {kind}: {verified.outcome}; nothing of {decision.study} was released"
        yield from (f"  - {reason}" for reason in decision.reasons)
    if decision.coarser:
        yield "COARSER THAN THE DEFAULT THRESHOLDS"
        yield from (f"  - {sentence}" for sentence in decision.coarser)
    if decision.simulated:
        yield "SIMULATED: sites ran on one machine with seeded randomness; the epsilon protects nobody"
    for site, facts in decision.sites.items():
        yield f"  {site}: trained on {_epsilon(facts.members)}; held out {_epsilon(facts.nonmembers)}"
    yield from (f"  {finding}" for finding in verified.findings)
    expiry = f", expires {utc_text(predicate.expires)}" if predicate.expires else ""
    yield f"  decision {predicate.decision_id}"
    yield f"  issued {utc_text(predicate.issued)}{expiry}"
    yield f"  signed by key {verified.key_fingerprint}"
    for signed in verified.countersigned:
        yield f"  countersigned {utc_text(signed.signed)} by key {signed.fingerprint}, who signed as {signed.role!r}"
    if verified.revocations:
        yield (
            f"  not on the auditor's list of revocations {verified.revocations.number} "
            f"of {utc_text(verified.revocations.issued)}"
        )
    if not verified.pinned:
        yield "  This key came with the bundle. Compare the fingerprint with the auditor's own word, or use --key."


def _epsilon(cohort: CohortEpsilon) -> str:
    if cohort.upper == "infinite":
        return "no guarantee (epsilon is infinite)"
    return f"epsilon {cohort.upper:.3f} (delta {cohort.delta:g}, {cohort.accountant})"
