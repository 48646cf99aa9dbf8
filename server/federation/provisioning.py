"""Make a federation, write welcomes for its sites, renew its own certificates."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from common.errors import IntegrityError, SettingsError
from common.evidence.atomic import whole_folder, write_atomic
from common.evidence.signing import create_signing_key, load_signing_key, public_key_hex
from common.identity.welcome import Welcome
from common.settings.federation import FederationSettings, load_federation
from common.settings.load import problems_text, settings_yaml
from server.federation.authority import (
    LOOPBACK,
    Authority,
    create_server_key,
    load_certificate,
    load_private_key,
    load_revocations,
)
from server.federation.folder import FederationFolder
from server.federation.registry import EnrolledSite, Registry

RENEW_WITHIN: Final = timedelta(days=30)
_SECRET_BYTES: Final = 32


class Service(StrEnum):
    """What the coordinator itself holds certificates for."""

    GATEWAY = "gateway"
    SUPERLINK = "superlink"
    COORDINATOR = "coordinator"


@dataclass(frozen=True, kw_only=True)
class Renewed:
    """One renewed certificate."""

    service: Service
    not_after: datetime


def federation_settings(**given: object) -> FederationSettings:
    """Settings from what somebody gave on the command line. Raises SettingsError listing every problem."""
    try:
        return FederationSettings.model_validate(given)
    except ValidationError as failure:
        raise SettingsError(problems_text(failure, FederationSettings, "federation")) from failure


def create_federation(path: Path, settings: FederationSettings, *, now: datetime) -> FederationFolder:
    """Make a federation folder, whole or not at all. Raises UsageError when `path` holds anything."""
    with whole_folder(path) as part:
        folder = FederationFolder(path=part)
        files = (folder.authority_key, folder.gateway_key, folder.superlink_key, folder.signing_key)
        for parent in (*(file.parent for file in files), folder.sites, folder.runs, folder.log):
            parent.mkdir(mode=0o700)
        write_atomic(folder.settings_file, settings_yaml(settings).encode())
        authority = Authority.create(federation=settings.name, now=now)
        authority.write(folder)
        create_server_key(folder.gateway_key)
        create_server_key(folder.superlink_key)
        create_signing_key(folder.signing_key)
        write_atomic(folder.superexec_secret, secrets.token_hex(_SECRET_BYTES).encode(), mode=0o600)
        for service in Service:
            _write_service(folder, authority, service, settings, now)
        Registry.create(folder, authority, now=now)
    return FederationFolder.open(path)


def seal_welcome(folder: FederationFolder, site: EnrolledSite, *, app_digest: str) -> str:
    """welcome.json for an enrolled site. app_digest: of the one app that this federation sends.

    Raises IntegrityError when the site's certificate is not the newest one of the registry.
    """
    settings = load_federation(folder.path)
    certificate = load_certificate(folder.site_certificate(site.name))
    if int(site.serial, 16) != certificate.serial_number:
        raise IntegrityError(
            f"{folder.site_certificate(site.name)} is not the certificate that the registry names; no welcome was "
            f"written. Run `consilium federation renew {folder.path} --site {site.name}`."
        )
    key = load_signing_key(folder.signing_key)
    welcome = Welcome(
        federation=settings.name,
        site=site.name,
        host=settings.host,
        port=settings.port,
        ca_pem=folder.authority_certificate.read_text("ascii"),
        site_pem=certificate.public_bytes(Encoding.PEM).decode(),
        coordinator_key=public_key_hex(key.public_key()),
        app_digest=app_digest,
        flower_version=version("flwr"),
        consilium_version=version("consilium"),
    )
    return welcome.to_json(key=key, certificate_pem=folder.signing_certificate.read_text("ascii"))


def renew_services(folder: FederationFolder, services: Iterable[Service], *, now: datetime) -> tuple[Renewed, ...]:
    """New certificates for the keys that are there, with the host name that federation.yaml says today.

    The keys stay, so that only one file changes and a service never finds two that do not fit.
    """
    authority, settings = Authority.open(folder), load_federation(folder.path)
    return tuple(
        Renewed(service=service, not_after=_write_service(folder, authority, service, settings, now))
        for service in services
    )


def due(folder: FederationFolder, *, now: datetime) -> tuple[Service, ...]:
    """Services whose certificates end within 30 days."""
    return tuple(
        service
        for service in Service
        if load_certificate(_certificate_file(folder, service)).not_valid_after_utc < now + RENEW_WITHIN
    )


def revocations_due(folder: FederationFolder, *, now: datetime) -> bool:
    """Whether the revocation list is missing or damaged, lacks a revoked site, or grows old within 30 days."""
    if not Registry(folder).listed():
        return True
    following = load_revocations(folder.revocations).next_update_utc
    return following is None or following < now + RENEW_WITHIN


def _write_service(
    folder: FederationFolder, authority: Authority, service: Service, settings: FederationSettings, now: datetime
) -> datetime:
    """Issue and store one certificate; returns when it ends."""
    certificate = _issue(folder, authority, service, settings, now)
    write_atomic(_certificate_file(folder, service), certificate.public_bytes(Encoding.PEM))
    return certificate.not_valid_after_utc


def _issue(
    folder: FederationFolder, authority: Authority, service: Service, settings: FederationSettings, now: datetime
) -> x509.Certificate:
    days = settings.certificate_days
    match service:
        case Service.GATEWAY:
            addresses = (settings.host, *(LOOPBACK if settings.certify_loopback else ()))
            key = _server_key(folder.gateway_key)
            return authority.issue_server(key, name="gateway", addresses=addresses, days=days, now=now)
        case Service.SUPERLINK:
            key = _server_key(folder.superlink_key)
            return authority.issue_server(key, name="superlink", addresses=LOOPBACK, days=days, now=now)
        case Service.COORDINATOR:
            signing: Ed25519PublicKey = load_signing_key(folder.signing_key).public_key()
            return authority.issue_signing(signing, federation=settings.name, days=days, now=now)


def _server_key(path: Path) -> EllipticCurvePublicKey:
    return load_private_key(path).public_key()


def _certificate_file(folder: FederationFolder, service: Service) -> Path:
    match service:
        case Service.GATEWAY:
            return folder.gateway_certificate
        case Service.SUPERLINK:
            return folder.superlink_certificate
        case Service.COORDINATOR:
            return folder.signing_certificate
