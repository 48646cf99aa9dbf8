"""Make a site, and have it join a federation: `consilium site init`, `consilium site join`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ConsiliumError, UsageError
from common.identity.keys import grouped
from common.telemetry.security_log import SecurityLog

Folder = Annotated[Path, typer.Argument(help="The site's own folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def init(
    folder: Annotated[Path, typer.Argument(help="The site's own folder; made when missing.", show_default=False)],
    *,
    name: Annotated[str, typer.Option(help="Name of the site: a-z, 0-9 and '-'.", show_default=False)],
    hospital: Annotated[str, typer.Option(help="The hospital, for people: at most 64 characters.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of scans; not read now.", show_default=False)],
    key: Annotated[
        Path | None, typer.Option(help="A P-256 or P-384 key that the site has already; otherwise one is made.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a site: settings, a policy that allows nothing, a key that never leaves, and a request to send."""
    from client.joining import NODE_KEY, init_site  # noqa: PLC0415
    from client.site_folder import POLICY_FILE  # noqa: PLC0415

    made = init_site(folder, name=name, hospital=hospital, data=data, key=key, now=datetime.now(UTC))
    shown = grouped(made.request.fingerprint)
    SecurityLog.of_folder(folder).note(operation="site-init", outcome="done", site=name, fingerprint=shown)
    if as_json:
        facts = {"site": name, "hospital": hospital, "fingerprint": shown, "request": str(made.request_file)}
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    typer.echo(f"site         {name} ({hospital}) in {folder}")
    typer.echo(f"key          {folder / NODE_KEY}; it stays here, and no backup but yours has it")
    typer.echo(f"fingerprint  {shown}")
    kept = "was there and stays as it is" if made.adopted_policy else "allows nothing until you approve a study"
    typer.echo(f"policy       {folder / POLICY_FILE} {kept}")
    typer.echo(f"next         send {made.request_file} to the coordinator, and read the fingerprint to it by telephone")


def join(
    folder: Folder,
    welcome: Annotated[Path, typer.Argument(help="welcome.json, from the coordinator.", show_default=False)],
    *,
    ca_fingerprint: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256:...",
            help="Fingerprint of the federation's authority, as the coordinator told it over another channel.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Accept the coordinator's welcome, once its authority's fingerprint is confirmed. Repeat it after a renewal."""
    from client.joining import join_site  # noqa: PLC0415

    try:
        data = welcome.read_bytes()
    except OSError as error:
        raise UsageError(f"the welcome {welcome} cannot be read ({error.strerror}); nothing was stored.") from error
    log = SecurityLog.of_folder(folder)
    try:
        joined = join_site(folder, data, welcome.name, ca_fingerprint=ca_fingerprint, now=datetime.now(UTC))
    except ConsiliumError as error:
        if folder.is_dir():
            log.note(operation="join", outcome="refused", reason=type(error).__name__)
        raise
    accepted = joined.welcome
    facts = {
        "federation": accepted.federation,
        "site": accepted.site,
        "address": accepted.address,
        "authority": grouped(accepted.ca_fingerprint),
        "coordinator_key": accepted.coordinator_key,
        "app_digest": accepted.app_digest,
        "expires": accepted.expires.isoformat(),
    }
    log.note(operation="join", outcome="renewed" if joined.renewed else "joined", **facts)
    if as_json:
        typer.echo(json.dumps({**facts, "renewed": joined.renewed, "notes": joined.notes}, indent=2, sort_keys=True))
        return
    typer.echo(f"{'renewed     ' if joined.renewed else 'joined      '} {accepted.federation} as {accepted.site}")
    typer.echo(f"gateway      {accepted.address}")
    typer.echo(f"authority    {facts['authority']}")
    typer.echo(f"coordinator  {accepted.coordinator_key}")
    typer.echo(f"app          {accepted.app_digest}")
    typer.echo(f"until        {accepted.expires:%Y-%m-%d}")
    for note in joined.notes:
        typer.echo(f"note         {note}")
    typer.echo(f"next         consilium site doctor {folder}; nothing runs until `consilium site serve`")
