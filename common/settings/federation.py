"""A coordinator's federation.yaml: under which name and address hospitals know it, and where its services listen."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from common.settings.load import load_settings
from common.settings.study import Settings

FEDERATION_FILE = "federation.yaml"
SETTINGS_VERSION = 1
DEFAULT_DAYS = 365
DEFAULT_FIRST_PORT = 18000
_LONGEST_HOST = 253  # [RFC 1035, 2.3.4]
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def checked_host(text: str) -> str:
    """A host name, an IPv4 address, or an IPv6 address without brackets. Raises ValueError for anything else.

    It becomes the name in a certificate and a line of nginx's configuration, where a mistake shows late or never.
    """
    if ":" in text or re.fullmatch(r"[0-9.]+", text):
        try:
            ip_address(text)
        except ValueError as error:
            raise ValueError(f"{text!r} is neither a host name nor an IP address; leave out scheme and port") from error
    elif len(text) > _LONGEST_HOST or not all(_LABEL.fullmatch(label) for label in text.split(".")):
        raise ValueError(
            f"{text!r} is no host name: labels of 1 to 63 letters, digits and inner '-', joined by dots, "
            f"{_LONGEST_HOST} characters at most; leave out scheme, port and path"
        )
    return text


FederationName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Host = Annotated[str, AfterValidator(checked_host)]
Port = Annotated[int, Field(ge=1, le=65535)]
Days = Annotated[int, Field(ge=1, le=825)]


class FederationSettings(Settings):
    """One coordinator's installation. Everything but `listen` and `port` stays on the loopback interface.

    name: of the federation, in its certificates. host, port: where sites reach the gateway, as they write it.
    listen: address of this machine that the gateway binds. certify_loopback: its certificate also holds for localhost
    and 127.0.0.1. certificate_days: life of a certificate and of a revocation list, in days.
    superlink_port, superlink_health_port, exporter_port (Prometheus), coordinator_health_port: on 127.0.0.1.
    nginx: program, a path or a name to look up. body_cap_mib: largest request body, in MiB; a generator must fit.
    requests_per_second, burst: what the gateway lets one address ask for before it answers 503.
    """

    version: Annotated[int, Field(ge=SETTINGS_VERSION, le=SETTINGS_VERSION)] = SETTINGS_VERSION
    name: FederationName
    host: Host
    port: Port
    listen: Host = "0.0.0.0"  # noqa: S104  the one public listener; everything else is on loopback
    certify_loopback: bool = False
    certificate_days: Days = DEFAULT_DAYS
    superlink_port: Port = DEFAULT_FIRST_PORT
    superlink_health_port: Port = DEFAULT_FIRST_PORT + 1
    exporter_port: Port = DEFAULT_FIRST_PORT + 2
    coordinator_health_port: Port = DEFAULT_FIRST_PORT + 3
    nginx: Annotated[str, Field(min_length=1)] = "nginx"
    body_cap_mib: Annotated[int, Field(ge=1, le=1024)] = 16
    requests_per_second: Annotated[int, Field(ge=1, le=10_000)] = 50
    burst: Annotated[int, Field(ge=0, le=100_000)] = 200

    @model_validator(mode="after")
    def _ports_differ(self) -> FederationSettings:
        names = ("port", "superlink_port", "superlink_health_port", "exporter_port", "coordinator_health_port")
        taken: dict[int, str] = {}
        for name in names:
            number = getattr(self, name)
            if number in taken:
                raise ValueError(f"{name}: {number} is the port of {taken[number]} as well")
            taken[number] = name
        return self

    @property
    def address(self) -> str:
        """`host:port` as a SuperNode is told."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def load_federation(folder: Path) -> FederationSettings:
    """The settings of a federation folder. Raises SettingsError."""
    return load_settings(folder / FEDERATION_FILE, FederationSettings)
