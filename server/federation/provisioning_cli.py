"""Found a federation of hospitals and run its services: who may take part, what runs, how a campaign goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ConsiliumError, Unreachable, UsageError
from common.evidence.atomic import write_atomic
from common.identity.keys import fingerprint, grouped
from common.identity.request import LARGEST_REQUEST, check_request
from common.settings.federation import DEFAULT_DAYS, DEFAULT_FIRST_PORT, load_federation
from common.telemetry.security_log import SecurityLog
from server.federation.authority import expires, load_certificate
from server.federation.bundle import app_digest
from server.federation.folder import FederationFolder
from server.federation.provisioning import (
    RENEW_WITHIN,
    Service,
    create_federation,
    due,
    federation_settings,
    renew_services,
    revocations_due,
    seal_welcome,
)
from server.federation.registry import EnrolledSite, Registry

Folder = Annotated[Path, typer.Argument(help="The federation's folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_LOOPBACK_PORTS = 4


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make; must not hold anything.", show_default=False)],
    *,
    name: Annotated[str, typer.Option(help="Name of the federation: a-z, 0-9 and '-'.", show_default=False)],
    host: Annotated[str, typer.Option(help="Host name or address that sites connect to.", show_default=False)],
    port: Annotated[int, typer.Option(help="Port of the gateway there.", min=1, max=65535)] = 443,
    days: Annotated[int, typer.Option(help="Life of a certificate, in days.", min=1, max=825)] = DEFAULT_DAYS,
    loopback_port: Annotated[
        int, typer.Option(help="First of four ports on 127.0.0.1.", min=1, max=65536 - _LOOPBACK_PORTS)
    ] = DEFAULT_FIRST_PORT,
    certify_loopback: Annotated[
        bool, typer.Option("--certify-loopback", help="The gateway's certificate also holds for localhost.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a federation: its authority, certificates and keys, and an empty list of sites."""
    settings = federation_settings(
        name=name,
        host=host,
        port=port,
        certificate_days=days,
        certify_loopback=certify_loopback,
        superlink_port=loopback_port,
        superlink_health_port=loopback_port + 1,
        exporter_port=loopback_port + 2,
        coordinator_health_port=loopback_port + 3,
    )
    made = create_federation(folder, settings, now=datetime.now(UTC))
    authority = _authority(made)
    SecurityLog.of_folder(folder).note(
        operation="federation-init", outcome="done", federation=name, authority=authority
    )
    ends = expires(folder)
    if as_json:
        facts = {"federation": name, "address": settings.address, "authority": authority, "expires": _texts(ends)}
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    typer.echo(f"federation  {name} in {folder}")
    typer.echo(f"authority   {authority}, until {ends['authority']:%Y-%m-%d}")
    typer.echo(f"gateway     {settings.address}, certificate until {ends['gateway']:%Y-%m-%d}")
    typer.echo("keep        a copy of the authority folder offline: a lost authority means enrolling every site anew")
    typer.echo(f"next        consilium federation enrol {folder} REQUEST --out welcome.json, for each site's request")


def enrol(
    folder: Folder,
    request: Annotated[Path, typer.Argument(help="The site's request.pem.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="File to write the site's welcome to.", show_default=False)],
    expect_fingerprint: Annotated[
        str | None,
        typer.Option(metavar="SHA256:...", help="Fingerprint that the site told; another key is refused."),
    ] = None,
    days: Annotated[
        int | None, typer.Option(help="Life of the certificate, in days; as in federation.yaml when left out.", min=1)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take a site in: check its request, issue its certificate, write its welcome. No other site changes."""
    found = FederationFolder.open(folder)
    _check_free(out, "nobody was enrolled")
    with _refusals_noted(folder, "enrol"):
        asked = check_request(_read(request), request.name)
        site = Registry(found).enrol(
            asked,
            now=datetime.now(UTC),
            days=days or load_federation(folder).certificate_days,
            expect_fingerprint=expect_fingerprint,
        )
    write_atomic(out, seal_welcome(found, site, app_digest=app_digest()).encode())
    shown = grouped(site.fingerprint)
    SecurityLog.of_folder(folder).note(
        operation="enrol", outcome="done", site=site.name, fingerprint=shown, serial=site.serial
    )
    told = _tell_superlink(folder)
    authority = _authority(found)
    if as_json:
        facts = {
            "site": site.name,
            "hospital": site.hospital,
            "fingerprint": shown,
            "compared": expect_fingerprint is not None,
            "serial": site.serial,
            "expires": site.not_after.isoformat(),
            "authority": authority,
            "welcome": str(out),
            "superlink": told,
        }
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    typer.echo(f"enrolled     {site.name} ({site.hospital}) until {site.not_after:%Y-%m-%d}")
    compared = "as expected" if expect_fingerprint else "NOT COMPARED: have the site read its own to you"
    typer.echo(f"fingerprint  {shown} ({compared})")
    typer.echo(f"authority    {authority}: read it to the site, which needs it to join")
    typer.echo(f"superlink    {told}")
    typer.echo(f"welcome      {out}: send it to the site")


def revoke(
    folder: Folder,
    site: Annotated[str, typer.Argument(help="Name of the site.", show_default=False)],
    *,
    reason: Annotated[str, typer.Option(help="Why, in one sentence without patient data.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Take a site out, at once and with every certificate it ever had. No other site changes."""
    with _refusals_noted(folder, "revoke"):
        registry = Registry(folder)
        revoked = registry.revoke(site, reason=reason, now=datetime.now(UTC))
    listed = registry.listed()
    SecurityLog.of_folder(folder).note(
        operation="revoke", outcome="done", site=site, fingerprint=grouped(revoked.fingerprint), reason=revoked.reason
    )
    told = _tell_superlink(folder)
    if as_json:
        facts = {"site": site, "fingerprint": grouped(revoked.fingerprint), "superlink": told, "reason": revoked.reason}
        typer.echo(json.dumps({**facts, "listed": listed, "serials": revoked.serials}, indent=2, sort_keys=True))
        return
    typer.echo(f"revoked      {site}: {len(revoked.serials)} certificates, key {grouped(revoked.fingerprint)}")
    typer.echo(f"superlink    {told}")
    if not listed:
        typer.echo(
            f"list         NOT WRITTEN: bring the authority's key back and run `consilium federation renew {folder}`"
        )
    typer.echo("again        the hospital may come back with a new key: `consilium site init` in a new folder")


def renew(
    folder: Folder,
    *,
    site: Annotated[str | None, typer.Option(help="Renew this site's certificate; needs --out.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the site's new welcome to.")] = None,
    gateway: Annotated[
        bool, typer.Option("--gateway", help="Renew gateway, SuperLink and coordinator now, due or not.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Renew certificates: one site's, or the coordinator's own that end within 30 days. Keys and authority stay."""
    if (site is None) != (out is None) or (site is not None and gateway):
        raise UsageError("--site and --out go together, and not with --gateway; nothing was renewed.")
    found, now = FederationFolder.open(folder), datetime.now(UTC)
    if site is not None and out is not None:
        _check_free(out, "nothing was renewed")
        with _refusals_noted(folder, "renew"):
            renewed = Registry(found).renew(site, now=now, days=load_federation(folder).certificate_days)
        write_atomic(out, seal_welcome(found, renewed, app_digest=app_digest()).encode())
        ends = {f"site/{site}": renewed.not_after}
    else:
        ends = _renew_own(found, now=now, everything=gateway)
    log = SecurityLog.of_folder(folder)
    for name, end in ends.items():
        log.note(operation="renew", outcome="done", certificate=name, expires=end.isoformat())
    if as_json:
        typer.echo(json.dumps({"renewed": _texts(ends), "welcome": str(out) if out else None}, indent=2))
        return
    for name, end in ends.items():
        typer.echo(f"renewed  {name} until {end:%Y-%m-%d}")
    if not ends:
        typer.echo(f"nothing ends within {RENEW_WITHIN.days} days; nothing was renewed")
    elif out is not None:
        typer.echo(
            f"welcome  {out}: send it to the site, which runs `consilium site join` with it; no fingerprint again"
        )
    else:
        typer.echo("running services keep what they have read until `consilium federation serve` starts again")


def sites(folder: Folder, as_json: AsJson = False) -> None:
    """List the sites of a federation and when every certificate ends, with a warning 30 days before."""
    found, now = FederationFolder.open(folder), datetime.now(UTC)
    known, ends = Registry(found).all(), expires(folder)
    soon = {name: end for name, end in ends.items() if end < now + RENEW_WITHIN}
    if as_json:
        facts = {
            "authority": _authority(found),
            "sites": [_facts(site, now) for site in known],
            "expires": _texts(ends),
            "warnings": [_warning(folder, name, end, now) for name, end in soon.items()],
        }
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    typer.echo(f"authority  {_authority(found)}, until {ends['authority']:%Y-%m-%d}")
    for site in known:
        when = f"until {site.not_after:%Y-%m-%d}" if site.revoked_at is None else f"on {site.revoked_at:%Y-%m-%d}"
        typer.echo(f"{_state(site, now):<9}  {site.name} ({site.hospital}), {when}, {grouped(site.fingerprint)}")
    if not known:
        typer.echo("no site is enrolled yet")
    for name, end in soon.items():
        typer.echo(f"warning    {_warning(folder, name, end, now)}")


# --- what several commands need ---------------------------------------------------------------------------------------


def _renew_own(folder: FederationFolder, *, now: datetime, everything: bool) -> dict[str, datetime]:
    """Renew the coordinator's certificates and the revocation list; those that are due, or all."""
    services = tuple(Service) if everything else due(folder, now=now)
    ends = {entry.service.value: entry.not_after for entry in renew_services(folder, services, now=now)}
    if everything or revocations_due(folder, now=now):
        ends["revocation-list"] = Registry(folder).write_revocations(now=now)
    return ends


def _tell_superlink(folder: Path) -> str:
    """Bring the running SuperLink up to date; says in words what came of it.

    The registry has changed already, so nothing here may undo that: a SuperLink that does not run asks at its start.
    Raises IntegrityError when it runs and refuses.
    """
    from server.federation.control import sync_nodes  # noqa: PLC0415  Flower takes a second to import

    try:
        changed = sync_nodes(folder)
    except Unreachable:
        return "does not run; it will be told when `consilium federation serve` starts"
    names = [f"+{name}" for name in changed.registered] + [f"-{name}" for name in changed.unregistered]
    return f"told: {', '.join(names) or 'nothing was new to it'}"


@contextmanager
def _refusals_noted(folder: Path, operation: str) -> Iterator[None]:
    """Put what was refused into the security log, by the kind of the error only: its text may quote a stranger."""
    FederationFolder.open(folder)
    try:
        yield
    except ConsiliumError as error:
        SecurityLog.of_folder(folder).note(operation=operation, outcome="refused", reason=type(error).__name__)
        raise


def _authority(folder: FederationFolder) -> str:
    return grouped(fingerprint(load_certificate(folder.authority_certificate).public_key()))


def _state(site: EnrolledSite, now: datetime) -> str:
    return "expired" if site.revoked_at is None and not site.valid(now) else site.state.value


def _facts(site: EnrolledSite, now: datetime) -> dict[str, object]:
    return {
        "name": site.name,
        "hospital": site.hospital,
        "state": _state(site, now),
        "fingerprint": grouped(site.fingerprint),
        "public_key": site.public_key,
        "serial": site.serial,
        "expires": site.not_after.isoformat(),
        "enrolled_at": site.enrolled_at.isoformat(),
        "revoked_at": None if site.revoked_at is None else site.revoked_at.isoformat(),
        "reason": site.reason,
    }


def _warning(folder: Path, name: str, end: datetime, now: datetime) -> str:
    """What ends, when, and the command against it."""
    when = f"ended on {end:%Y-%m-%d}" if end <= now else f"ends on {end:%Y-%m-%d}, in {(end - now).days} days"
    kind, _, site = name.partition("/")
    if name == "authority":
        return f"{name} {when}: found a new federation and enrol every site there"
    command = f"renew {folder} --site {site} --out welcome.json" if kind == "site" else f"renew {folder}"
    return f"{name} {when}: consilium federation {command}"


def _texts(ends: Mapping[str, datetime]) -> dict[str, str]:
    return {name: end.isoformat() for name, end in ends.items()}


def _check_free(out: Path, consequence: str) -> None:
    """Before anything is issued. Raises UsageError when the welcome could not be written to `out`."""
    if out.exists():
        raise UsageError(f"{out} exists already; {consequence}. Name another file with --out, or remove it.")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is not a folder; {consequence}. Make it, or name another file with --out.")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(LARGEST_REQUEST + 1)  # a wrong file may be a scan of gigabytes
    except OSError as error:
        raise UsageError(f"the request {path} cannot be read ({error.strerror}); nobody was enrolled.") from error
