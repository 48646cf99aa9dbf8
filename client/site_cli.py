"""A hospital's own site: what it allows, how it is, and what it has spent."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import click
import typer

from common.errors import ExitCode, UsageError
from common.telemetry.security_log import SecurityLog

Folder = Annotated[Path, typer.Argument(metavar="SITE", help="The site's own folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def approve(
    site: Folder,
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="The study file, from the coordinator.", show_default=False)
    ],
    *,
    by: Annotated[str, typer.Option(metavar="NAME", help="Who approves it; recorded.", show_default=False)],
    coordinator_key: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="The coordinator's key; of the federation that was joined when left out."),
    ] = None,
    app_digest: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="The app that the runner accepts; the federation's own when left out."),
    ] = None,
    code_digest: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="What the installed code should be; refused when it is other code."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Approve a study after showing what it asks, and record who did. Exit code 1 when the limits forbid it."""
    from client.approval import approve as write_approval  # noqa: PLC0415
    from client.approval import propose  # noqa: PLC0415
    from client.approval_view import as_object, difference, summary  # noqa: PLC0415
    from client.site_folder import site_folder  # noqa: PLC0415

    folder = site_folder(site)
    if as_json and not yes:
        raise UsageError("--json asks nobody; nothing was approved. Add --yes, or leave --json out to be asked.")
    proposal = propose(
        folder,
        study,
        by=by,
        coordinator_key=coordinator_key,
        app_digest=app_digest,
        expected_code=code_digest,
        now=datetime.now(UTC),
    )
    facts = {"study": proposal.study.study, "digest": proposal.approval.digest}
    log = SecurityLog.of_folder(folder)
    if proposal.objections:
        log.note(operation="approval", outcome="refused", **facts, objections=len(proposal.objections))
    if not as_json:
        typer.echo(summary(proposal))
        typer.echo(f"\n{difference(proposal.change)}\n")
    elif proposal.objections:
        typer.echo(json.dumps(as_object(proposal, approved=False), indent=2, sort_keys=True))
        raise typer.Exit(ExitCode.REFUSED)
    if not proposal.objections and not yes and not _agreed(f"Approve {proposal.study.study}?"):
        log.note(operation="approval", outcome="declined", **facts)
        typer.echo("nothing was approved")
        raise typer.Exit(ExitCode.REFUSED)
    write_approval(proposal)
    log.note(
        operation="approval",
        outcome="granted",
        **facts,
        by=proposal.approval.approved_by,
        coordinator_key=proposal.approval.coordinator_key,
        code_digest=proposal.code,
        app_digest=proposal.app_digest,
    )
    if as_json:
        typer.echo(json.dumps(as_object(proposal, approved=True), indent=2, sort_keys=True))
    else:
        typer.echo(f"approved      {proposal.study.study}; it holds from the next order on")


def revoke_approval(
    site: Folder,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="The study's name, or its digest.", show_default=False)],
    *,
    as_json: AsJson = False,
) -> None:
    """Take back the approval of a study. From the next order on it is refused; what it has spent stays spent."""
    from client.approval import propose_revocation, write_change  # noqa: PLC0415
    from client.approval_view import difference  # noqa: PLC0415
    from client.site_folder import site_folder  # noqa: PLC0415

    folder = site_folder(site)
    change, approval = propose_revocation(folder, study)
    write_change(change)
    SecurityLog.of_folder(folder).note(
        operation="approval", outcome="revoked", study=approval.study, digest=approval.digest
    )
    if as_json:
        body = {"revoked": approval.model_dump(mode="json"), "diff": difference(change)}
        typer.echo(json.dumps(body, indent=2, sort_keys=True))
        return
    typer.echo(f"{difference(change)}\n")
    typer.echo(f"revoked       {approval.study} {approval.digest}; every order of it is refused from now on")


def pause(site: Folder, *, as_json: AsJson = False) -> None:
    """Have the site refuse every order, at no cost, until it is unpaused. An order that is worked on is finished."""
    _set_paused(site, paused=True, as_json=as_json)


def unpause(site: Folder, *, as_json: AsJson = False) -> None:
    """Have the site work on orders again."""
    _set_paused(site, paused=False, as_json=as_json)


def _set_paused(site: Path, *, paused: bool, as_json: bool) -> None:
    from client.site_folder import SITE_FILE, site_folder  # noqa: PLC0415
    from client.store import SiteStore  # noqa: PLC0415
    from common.settings.site import load_site  # noqa: PLC0415

    folder = site_folder(site)
    settings = load_site(folder / SITE_FILE)
    try:
        store = SiteStore(settings.state)
        was = store.paused
        (store.pause if paused else store.unpause)()
    except OSError as error:
        raise UsageError(f"{settings.state} cannot be written ({error.strerror}); nothing was changed.") from error
    if was is not paused:
        SecurityLog.of_folder(folder).note(operation="pause", outcome="on" if paused else "off", site=settings.site)
    if as_json:
        typer.echo(json.dumps({"site": settings.site, "paused": paused, "changed": was is not paused}))
    elif paused:
        typer.echo(f"paused        {settings.site} refuses every order until `consilium site unpause`")
    else:
        typer.echo(f"unpaused      {settings.site} works on orders" + ("" if was else "; it was not paused"))


def _agreed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except click.Abort as nobody:
        raise UsageError("nobody answered; nothing was approved. Add --yes to approve without being asked.") from nobody
