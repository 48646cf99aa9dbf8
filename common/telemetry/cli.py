"""Is a service well, and does a security log hold: what probes and auditors ask on the command line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ExitCode, UsageError, VerificationFailed


def health(
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Where a health server listens.", show_default=False)
    ],
    service: Annotated[
        str, typer.Option(help="`liveness`, `readiness`, or empty for the server as a whole.")
    ] = "readiness",
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask a service how it is by grpc.health.v1. Exit code 1 when it says that it is not well, 3 without an answer."""
    from common.telemetry.serving import is_healthy  # noqa: PLC0415

    well = is_healthy(address, service, timeout_s=timeout_s)
    answer = "SERVING" if well else "NOT_SERVING"
    typer.echo(json.dumps({"address": address, "service": service, "status": answer}) if as_json else answer)
    if not well:
        raise typer.Exit(ExitCode.REFUSED)


def security_log(
    file: Annotated[
        Path,
        typer.Argument(help="security.jsonl, or the site or federation folder it lies in.", show_default=False),
    ],
    operation: Annotated[str | None, typer.Option(help="Only lines of this operation, for example `enrol`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a security log line by line and show it. Exit code 1 when a line was changed, moved or removed."""
    from common.telemetry.security_log import SecurityLog  # noqa: PLC0415

    log = SecurityLog.of_folder(file) if file.is_dir() else SecurityLog(file)
    if not log.path.is_file():
        raise UsageError(f"there is no security log at {log.path}; nothing was checked.")
    try:
        records = log.verify()
    except VerificationFailed as damaged:
        text = str(damaged)
        typer.echo(json.dumps({"verified": False, "reason": text}) if as_json else f"NOT VERIFIED: {text}")
        raise typer.Exit(ExitCode.REFUSED) from damaged
    shown = [record for record in records if operation in (None, record.operation)]
    if as_json:
        typer.echo(json.dumps({"verified": True, "lines": len(records), "records": [asdict(r) for r in shown]}))
        return
    for record in shown:
        facts = ", ".join(f"{name}: {value}" for name, value in record.facts.items())
        typer.echo(f"{record.time[:19]}Z  {record.operation}  {record.outcome}  {facts}".rstrip())
    counts = Counter(record.outcome for record in shown)
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "nothing to show"
    typer.echo(f"VERIFIED: {len(records)} lines follow one another; {said}")
