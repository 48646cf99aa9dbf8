"""Check an audit that somebody else conducted: `consilium audit verify`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ExitCode
from common.evidence.cli import read_trusted_key


def verify(
    path: Annotated[Path, typer.Argument(help="A finished run, its audit folder, or a release.", show_default=False)],
    key: Annotated[Path | None, typer.Option(help="PEM of the auditor's public key that you trust.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check offline that an audit followed its signed plan and that its answers give its result.

    Exit code 0 only for an audit that holds and passed; 1 for one that did not pass, or that does not hold.
    """
    from server.audit.result import Verdict  # noqa: PLC0415
    from server.audit_verification import verify_audit  # noqa: PLC0415

    verified = verify_audit(path, trusted_key=read_trusted_key(key), now=datetime.now(UTC))
    verdict, decision = verified.result.verdict, verified.decision
    if as_json:
        facts = {
            "verified": True,
            "verdict": verdict.value,
            "outcome": decision.outcome.value,
            "decision_id": decision.id,
            "result_digest": verified.result.digest,
            "findings": list(verified.findings),
        }
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        typer.echo(
            f"VERIFIED: the audit of {decision.study} was conducted as planned; it found: {verdict.value.upper()}"
        )
        for line in (*verified.findings, *verified.result.reasons):
            typer.echo(f"  {line}")
        typer.echo(f"  decision {decision.id}: {decision.outcome.value}")
    if verdict is not Verdict.PASS:
        raise typer.Exit(code=ExitCode.REFUSED)
