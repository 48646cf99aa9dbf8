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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a release offline. Exit code 0 only for an authentic RELEASE; a refusal, even authentic, is 1."""
    verified = verify_bundle(release, trusted_key=read_trusted_key(key), now=datetime.now(UTC))
    if as_json:
        typer.echo(json.dumps(_facts(verified), indent=2, sort_keys=True))
    else:
        typer.echo("\n".join(_lines(verified)))
    if verified.outcome is not Outcome.RELEASE:
        raise typer.Exit(code=ExitCode.REFUSED)


def read_trusted_key(key: Path | None) -> bytes | None:
    """The PEM given with --key, if any. Raises UsageError when it cannot be read."""
    if key is None:
        return None
    try:
        return key.read_bytes()
    except OSError as error:
        raise UsageError(f"the trusted key {key} cannot be read ({error.strerror}); nothing was verified") from error


def _facts(verified: Verified) -> dict[str, Any]:
    predicate = verified.predicate.json_value()
    decision = predicate.pop("decision")
    return {
        "verified": True,
        "released": verified.outcome is Outcome.RELEASE,
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
    if verified.outcome is Outcome.RELEASE:
        yield f"VERIFIED: an authentic RELEASE of {decision.study}"
    else:
        yield f"VERIFIED AS A REFUSAL: {verified.outcome}; nothing of {decision.study} was released"
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
    if not verified.pinned:
        yield "  This key came with the bundle. Compare the fingerprint with the auditor's own word, or use --key."


def _epsilon(cohort: CohortEpsilon) -> str:
    if cohort.upper == "infinite":
        return "no guarantee (epsilon is infinite)"
    return f"epsilon {cohort.upper:.3f} (delta {cohort.delta:g}, {cohort.accountant})"
