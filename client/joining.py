"""How a hospital's machine becomes a site of a federation: make a key, send a request, accept the welcome.

    S/site.yaml policy.yaml          the hospital's own; the policy that is made here allows nothing
    S/identity/node.key request.pem  the key never leaves; the request goes to the coordinator
    S/federation/welcome.json        the coordinator's answer; ca.pem and site.pem are copied out of it

A key is made once. Neither command replaces one, and a federation that was joined is never exchanged for another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from client.site_folder import POLICY_FILE, SITE_FILE
from common.errors import PolicyRefusal, Refusal, SettingsError, UsageError, VerificationFailed
from common.evidence.atomic import write_atomic
from common.identity.keys import adopt_node_key, create_node_key, fingerprint, grouped, load_node_key, read_fingerprint
from common.identity.request import SiteRequest, build_request, check_request, name_problems
from common.identity.welcome import Welcome
from common.settings.load import settings_yaml
from common.settings.site import SitePolicy, SiteSettings, load_site

NODE_KEY: Final = Path("identity", "node.key")
REQUEST: Final = Path("identity", "request.pem")
WELCOME: Final = Path("federation", "welcome.json")
AUTHORITY: Final = Path("federation", "ca.pem")
CERTIFICATE: Final = Path("federation", "site.pem")
_POLICY_DAYS: Final = 365
_SITE_HEADER: Final = "# This site's installation. It never leaves the hospital.\n"
_POLICY_HEADER: Final = (
    "# What this hospital allows. As it was made it allows nothing: no study, no purpose, no order, no code.\n"
    "# `consilium site approve` adds a study after showing what it asks; the limits below are yours to set.\n"
)


@dataclass(frozen=True, kw_only=True)
class NewSite:
    """What `init_site` made. adopted_policy: a policy.yaml was there already and stays as it is."""

    request: SiteRequest
    request_file: Path
    adopted_policy: bool


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What `join_site` accepted. renewed: this site had joined before; notes: what a person should know."""

    welcome: Welcome
    renewed: bool
    notes: tuple[str, ...]


def init_site(folder: Path, *, name: str, hospital: str, data: Path, key: Path | None, now: datetime) -> NewSite:
    """Make a site folder: settings, a policy that allows nothing, a key and the request for the coordinator.

    data: folder of scans, not read here. key: one that the site has already, PEM or OpenSSH; None makes one.
    Raises SettingsError listing what is wrong with the names, UsageError when this is a site already. A folder that
    an earlier try left unfinished is finished with the key that lies there.
    """
    if (folder / SITE_FILE).exists():
        raise UsageError(f"{folder} is a site already; nothing was changed. A key is made once: choose another folder.")
    if problems := name_problems(name, hospital):
        raise SettingsError("\n".join(f"--name, --hospital: {problem}" for problem in problems))
    if not data.is_dir():
        raise UsageError(f"--data {data} is not a folder; nothing was made. Give the folder that holds the scans.")
    for part in (folder, *(folder / file.parent for file in (NODE_KEY, WELCOME)), folder / "log", folder / "state"):
        part.mkdir(parents=True, exist_ok=True, mode=0o700)
    node_key = _node_key(folder / NODE_KEY, key)
    pem = build_request(node_key, site=name, hospital=hospital)
    write_atomic(folder / REQUEST, pem)
    adopted = (folder / POLICY_FILE).exists()
    if not adopted:
        write_atomic(folder / POLICY_FILE, (_POLICY_HEADER + settings_yaml(denying_policy(now))).encode())
    settings = SiteSettings(site=name, data=data.resolve(), state=Path("state"))
    # Last: with it the folder is a site, and everything else is there.
    write_atomic(folder / SITE_FILE, (_SITE_HEADER + settings_yaml(settings)).encode())
    return NewSite(request=check_request(pem, REQUEST.name), request_file=folder / REQUEST, adopted_policy=adopted)


def denying_policy(now: datetime) -> SitePolicy:
    """A policy that allows nothing, with cautious limits for the day when something is allowed."""
    return SitePolicy(
        epsilon_cap=1.0,
        delta_cap=1e-6,
        minimum_noise=1.0,
        maximum_rounds=20,
        maximum_steps=1000,
        minimum_patients=50,
        expires=(now + timedelta(days=_POLICY_DAYS)).date(),
    )


def join_site(folder: Path, data: bytes, name: str, *, ca_fingerprint: str | None, now: datetime) -> Joined:
    """Accept a welcome. (1) It holds together (2) it is of the federation that the hospital means (3) it is for this
    site and this key (4) its certificates are valid now (5) the software fits (6) it does not replace another
    federation or a newer welcome (7) it is stored.

    data, name: the file. ca_fingerprint: as the coordinator told it over another channel; not needed again for a
    renewal by the same authority. Raises VerificationFailed, Refusal or UsageError; nothing is stored then.
    """
    settings = load_site(folder / SITE_FILE)
    key = load_node_key(folder / NODE_KEY)
    welcome = Welcome.from_json(data, name)  # (1)
    earlier = read_welcome(folder) if (folder / WELCOME).exists() else None
    _confirm(welcome, ca_fingerprint, earlier)  # (2)
    if welcome.site != settings.site:  # (3)
        raise VerificationFailed(
            f"{name}: is for the site {welcome.site!r}, this is {settings.site!r}; nothing was stored. Ask for yours."
        )
    if welcome.certificate.public_key() != key.public_key():
        raise VerificationFailed(
            f"{name}: its certificate is not of this site's key {grouped(fingerprint(key.public_key()))}; nothing was "
            f"stored. Send {REQUEST} of this folder to the coordinator."
        )
    if problem := validity_problem(welcome, now):  # (4)
        raise VerificationFailed(f"{name}: {problem}; nothing was stored. Ask for a renewed welcome.")
    if welcome.flower_version != version("flwr"):  # (5)
        raise PolicyRefusal(
            f"{name}: the federation runs Flower {welcome.flower_version}, here Flower {version('flwr')} is installed; "
            "nothing was stored. Install the release of Consilium that the coordinator names."
        )
    _check_successor(earlier, welcome, folder)  # (6)
    for file, content in ((AUTHORITY, welcome.ca_pem), (CERTIFICATE, welcome.site_pem)):  # (7)
        write_atomic(folder / file, content.encode())
    write_atomic(folder / WELCOME, data)  # last: whoever finds it finds the other two
    return Joined(welcome=welcome, renewed=earlier is not None, notes=tuple(_notes(earlier, welcome)))


def read_welcome(folder: Path) -> Welcome:
    """The welcome that this site accepted.

    Raises UsageError when it has not joined, VerificationFailed when the file was changed. Says nothing about time:
    ask `validity_problem`.
    """
    path = folder / WELCOME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{folder} has joined no federation: {path} cannot be read ({error.strerror}). Send {REQUEST} to the "
            "coordinator, and run `consilium site join` with its answer."
        ) from error
    return Welcome.from_json(data, str(WELCOME))


def validity_problem(welcome: Welcome, now: datetime) -> str | None:
    """Why the certificates in a welcome do not hold at `now`, aware; None when they do."""
    for certificate, whose in ((welcome.certificate, "site"), (welcome.authority, "authority")):
        if now < certificate.not_valid_before_utc:
            return (
                f"the {whose}'s certificate begins at {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC and it is "
                f"{now:%Y-%m-%d %H:%M} UTC here: one of two clocks is wrong"
            )
        if now >= certificate.not_valid_after_utc:
            return f"the {whose}'s certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    return None


def expires(folder: Path) -> dict[str, datetime]:
    """When this site's certificates end, aware: `site` and `authority`; empty before it has joined. For metrics."""
    if not (folder / WELCOME).exists():
        return {}
    welcome = read_welcome(folder)
    return {"site": welcome.expires, "authority": welcome.authority.not_valid_after_utc}


def _node_key(path: Path, source: Path | None) -> EllipticCurvePrivateKey:
    """The key that lies there from an unfinished try, the one that the site brought, or a new one."""
    if path.exists():
        if source is not None:
            raise UsageError(
                f"a key already lies at {path}; nothing was changed. Leave --key out, or take a new folder."
            )
        return load_node_key(path)
    return create_node_key(path) if source is None else adopt_node_key(source, path)


def _confirm(welcome: Welcome, ca_fingerprint: str | None, earlier: Welcome | None) -> None:
    """Raise unless a person, now or when this site joined, has compared the authority's fingerprint."""
    if ca_fingerprint is None:
        if earlier is not None and earlier.ca_fingerprint == welcome.ca_fingerprint:
            return
        raise UsageError(
            f"this welcome is of the authority\n  {grouped(welcome.ca_fingerprint)}\n"
            "nothing was stored. Have the coordinator read its fingerprint to you, over another channel than the file "
            "came by, and repeat the command with --ca-fingerprint and what you were told."
        )
    if read_fingerprint(ca_fingerprint) != welcome.ca_fingerprint:
        raise VerificationFailed(
            f"the welcome is of the authority {grouped(welcome.ca_fingerprint)}, not of the one that was expected; "
            "nothing was stored. Somebody may have exchanged the file: call the coordinator."
        )


def _check_successor(earlier: Welcome | None, welcome: Welcome, folder: Path) -> None:
    if earlier is None:
        return
    if (earlier.ca_fingerprint, earlier.federation) != (welcome.ca_fingerprint, welcome.federation):
        raise Refusal(
            f"{folder} has joined the federation {earlier.federation}, authority {grouped(earlier.ca_fingerprint)}; "
            "nothing was stored. A site folder belongs to one federation: `consilium site init` in another folder."
        )
    if welcome.certificate.not_valid_before_utc < earlier.certificate.not_valid_before_utc:
        raise Refusal(
            f"this welcome is of {_issued(welcome)}, the stored one of {_issued(earlier)}; the older was not stored. "
            "Ask the coordinator for the newest."
        )


def _issued(welcome: Welcome) -> str:
    return f"{welcome.certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC"


def _notes(earlier: Welcome | None, welcome: Welcome) -> Iterator[str]:
    if welcome.consilium_version != version("consilium"):
        yield (
            f"the coordinator runs Consilium {welcome.consilium_version}, here {version('consilium')} is installed: "
            "`consilium site doctor` says whether they fit"
        )
    if earlier is not None and earlier.coordinator_key != welcome.coordinator_key:
        yield "the coordinator has a new key: studies that were approved for the old one must be approved again"
    if earlier is not None and earlier.app_digest != welcome.app_digest:
        yield "the federation sends another app: your policy's app_digests must name it"
