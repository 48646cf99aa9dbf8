"""What a hospital asks its own site. Nothing here is sent anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.site_folder import SITE_FILE
from common.errors import ExitCode, LedgerError, UsageError

if TYPE_CHECKING:
    from common.protocol.messages import LedgerHead


def ledger(
    site: Annotated[Path, typer.Argument(help="The site's site.yaml, or the folder it lies in.", show_default=False)],
    what_if: Annotated[
        Path | None,
        typer.Option(help="A study file: what its whole plan would cost here, and whether the cap allows it."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every row, and every head that a coordinator countersigned.")
    ] = False,
    head: Annotated[
        str | None, typer.Option(metavar="ROWS:HASH", help="Check too that the ledger once stood at this head.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a site's patients have spent, and what is left. Exit code 1 when a check or a what-if says no."""
    from client.ledger_report import read_report  # noqa: PLC0415
    from client.ledger_view import as_object, show  # noqa: PLC0415

    site_file = site / SITE_FILE if site.is_dir() else site
    noted = None if head is None else _head(head)
    try:
        report = read_report(site_file, what_if=what_if, verify=verify, noted=noted)
    except LedgerError as refused:
        if not (verify or head):
            raise
        text = str(refused)
        typer.echo(json.dumps({"verified": False, "reason": text}) if as_json else f"NOT VERIFIED: {text}")
        raise typer.Exit(ExitCode.REFUSED) from refused
    checked = verify or head is not None
    if as_json:
        typer.echo(json.dumps(as_object(report, checked=checked), indent=2, sort_keys=True, allow_nan=False))
    else:
        show(report, checked=checked)
    if report.what_if is not None and not report.what_if.allowed:
        raise typer.Exit(ExitCode.REFUSED)


def near_copies(
    site: Annotated[Path, typer.Argument(help="The site's site.yaml, or the folder it lies in.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which patients the last audit found most like a synthetic volume. For the hospital's own reviewer only."""
    from client.store import SiteStore  # noqa: PLC0415
    from common.settings.site import load_site  # noqa: PLC0415

    settings = load_site(site / SITE_FILE if site.is_dir() else site)
    found = {digest: store.review() for digest, store in SiteStore(settings.state).studies().items()}
    if as_json:
        body = {digest: None if cases is None else [asdict(case) for case in cases] for digest, cases in found.items()}
        typer.echo(json.dumps(body, indent=2, sort_keys=True))
        return
    for digest, cases in found.items():
        if cases is None:
            typer.echo(f"study {digest[:16]}: not scored yet")
            continue
        typer.echo(
            f"study {digest[:16]}: {len(cases)} patients are as like a synthetic volume as these among themselves"
        )
        for case in cases:
            kind = "trained on" if case.member else "held out"
            typer.echo(
                f"  {case.patient} ({kind}): volume {case.volume}, correlation {case.correlation:.3f}, "
                f"score {case.score:.2f}"
            )
    if not found:
        typer.echo("this site is enrolled in no study")


def _head(text: str) -> LedgerHead:
    """Read ROWS:HASH as `--json` and a release's evidence give it. Raises UsageError."""
    from common.protocol.messages import LedgerHead  # noqa: PLC0415

    rows, _, digest = text.partition(":")
    if not rows.isdecimal() or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise UsageError(f"--head {text!r} is not ROWS:HASH, a number and 64 hexadecimal digits; nothing was checked")
    return LedgerHead(rows=int(rows), hash=digest)
